// What one may ask, by theme.

/** Example questions by theme, in English, the language that the model was trained on, with their Turkish meaning. */
export const EXAMPLES = {
  rhythm: [
    ["What is the rhythm of this ECG, and is it regular?", "Bu EKG’de ritim nedir, düzenli mi?"],
    [
      "Are there P waves before every QRS complex? What is the heart rate?",
      "Her QRS kompleksinden önce P dalgası var mı? Kalp hızı kaç?",
    ],
    [
      "Does this image show atrial fibrillation or atrial flutter?",
      "Bu görüntüde atriyal fibrilasyon veya atriyal flutter var mı?",
    ],
  ],
  st: [
    [
      "Which leads show ST segment elevation or depression?",
      "Hangi derivasyonlarda ST yükselmesi veya çökmesi var?",
    ],
    [
      "Are there signs of acute myocardial infarction? If so, of which wall?",
      "Akut miyokard enfarktüsü bulguları var mı? Varsa hangi duvarda?",
    ],
    ["Are there reciprocal changes?", "Resiprokal değişiklikler var mı?"],
  ],
  conduction: [
    [
      "What are the PR interval and the QRS duration? Is there an atrioventricular block?",
      "PR aralığı ve QRS süresi ne kadar? Atriyoventriküler blok var mı?",
    ],
    [
      "Is there a bundle branch block, and on which side?",
      "Dal bloğu var mı, hangi tarafta?",
    ],
    [
      "What is the electrical axis? Is there a fascicular block?",
      "Elektriksel eksen nedir? Fasiküler blok var mı?",
    ],
  ],
  electrolytes: [
    [
      "Are there signs of hyperkalemia, such as peaked T waves or a wide QRS complex?",
      "Sivri T dalgaları veya geniş QRS gibi hiperkalemi bulguları var mı?",
    ],
    [
      "Are there U waves or flat T waves that would suggest hypokalemia?",
      "Hipokalemiyi düşündüren U dalgaları veya düz T dalgaları var mı?",
    ],
    [
      "Is the QT interval prolonged? Could calcium or a drug explain it?",
      "QT aralığı uzamış mı? Kalsiyum veya bir ilaç bunu açıklayabilir mi?",
    ],
  ],
  differential: [
    [
      "What is the most likely diagnosis, and what are the alternatives? Name the findings for and against each.",
      "En olası tanı nedir, seçenekler nelerdir? Her biri için lehte ve aleyhte bulguları say.",
    ],
    [
      "Could the ST changes be pericarditis or early repolarisation rather than infarction?",
      "ST değişiklikleri enfarktüs yerine perikardit veya erken repolarizasyon olabilir mi?",
    ],
    ["Please write a clinical report based on this ECG image.", "Bu EKG görüntüsüne dayanarak bir klinik rapor yaz."],
  ],
};
