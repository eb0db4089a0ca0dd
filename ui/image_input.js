// The image: dropped, pasted, chosen, photographed or given by its address; and the view of it that the model has.
//
// The file goes to the server byte for byte: making it smaller here would change what the model sees, and so the answer.
// EXIF orientation is applied by the server, and by browsers alike wherever they show an image or tell its natural size,
// so the preview and its tiles are those of the upright image.

import { RequestFailed } from "./api.js";
import { say, sayPlain } from "./i18n.js";
import { tileLayout } from "./tiles.js";

const ACCEPTED_BYTES = 20_000_000;
const HEAD_BYTES = 12;
const ADDRESS = /^(?:https?:\/\/\S+)?$/i;
const SIGNATURES = {
  "image/jpeg": /^\xff\xd8\xff/,
  "image/png": /^\x89PNG\r\n\x1a\n/,
  "image/gif": /^GIF8[79]a/,
  "image/bmp": /^BM/,
  "image/webp": /^RIFF....WEBP/s,
  "image/tiff": /^(?:II[*+]\0|MM\0[*+])/,
};

const byId = (id) => document.getElementById(id);
const percent = (part, whole) => `${(100 * part) / whole}%`;

/** What goes into a request: the URL, or the file as a data URI; null without an image. */
export async function imageContent(image) {
  if (!image?.file) return image?.url ?? null;
  const reader = new FileReader();
  reader.readAsDataURL(image.file.slice(0, image.file.size, image.type));
  await new Promise((resolve, reject) => {
    reader.onload = resolve;
    reader.onerror = () => reject(new RequestFailed("unreadable"));
  });
  return reader.result;
}

/** Holds the chosen image; dispatches "change" when it is another one. */
export class ImageInput extends EventTarget {
  /** `{name, type, file}`, `{url}`, or null. */
  image = null;
  #choice = 0;
  #size = null;
  #busy = false;

  constructor() {
    super();
    for (const id of ["file", "photo"]) {
      byId(id).addEventListener("change", ({ target }) => {
        if (target.files.length) this.#choose(target.files[0]);
        target.value = ""; // so that the same file can be chosen again
      });
    }
    byId("image-url").addEventListener("change", () => this.#chooseUrl(byId("image-url").value));
    byId("remove").addEventListener("click", () => {
      this.#choice++;
      this.#set(null);
      say(byId("image-note"), "image.removed");
      byId("file").focus();
    });
    byId("show-tiles").addEventListener("change", () => this.#drawTiles());
    document.addEventListener("paste", (event) => {
      const [file] = event.clipboardData.files;
      // Office programs put a picture of copied text beside the text: in a field, the text is meant.
      const text = event.target.matches?.("input, textarea") && event.clipboardData.types.includes("text/plain");
      if (!file || text) return;
      event.preventDefault();
      this.#choose(file);
    });
    this.#acceptDrops();
  }

  /** No change while an answer about the image is on its way. */
  set busy(busy) {
    this.#busy = busy;
    byId("image-input").disabled = busy;
    byId("remove").disabled = busy;
  }

  /** Whether what is shown here can be sent; if not, says why, and the field is there to be put right. */
  check() {
    if (!ADDRESS.test(byId("image-url").value.trim())) {
      say(byId("image-note"), "image.url.invalid");
      byId("image-url").focus();
      return false;
    }
    if (this.image?.file?.size > ACCEPTED_BYTES) {
      say(byId("image-note"), "image.tooLarge", { size: this.image.file.size / 1e6 });
      byId("remove").focus();
      return false;
    }
    return true;
  }

  /** The whole page takes drops: a file let go beside the field would otherwise replace the page. */
  #acceptDrops() {
    const mark = (over) => byId("drop").classList.toggle("over", over);
    const concerns = ({ dataTransfer: { types } }) => types.includes("Files") || types.includes("text/uri-list");
    document.addEventListener("dragover", (event) => {
      if (!concerns(event)) return; // text on its way into the question
      event.preventDefault();
      mark(true);
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) mark(false); // it left the window
    });
    document.addEventListener("drop", (event) => {
      if (!concerns(event)) return;
      event.preventDefault();
      mark(false);
      const [file] = event.dataTransfer.files;
      const url = event.dataTransfer.getData("text/uri-list").split(/\r?\n/, 1)[0];
      if (file) this.#choose(file);
      else if (url) this.#chooseUrl(url);
    });
  }

  async #choose(file) {
    if (this.#refusedAsBusy()) return;
    const choice = ++this.#choice;
    let head;
    try {
      head = String.fromCharCode(...new Uint8Array(await file.slice(0, HEAD_BYTES).arrayBuffer()));
    } catch {
      say(byId("image-note"), "image.unreadable");
      return;
    }
    // Meanwhile another one may have been chosen, or a question asked.
    if (choice !== this.#choice || this.#refusedAsBusy()) return;
    // As on the server, the first bytes decide what a file is, not its name.
    const type = Object.keys(SIGNATURES).find((candidate) => SIGNATURES[candidate].test(head));
    if (!type) {
      say(byId("image-note"), "image.unknown");
      return;
    }
    byId("image-url").value = "";
    this.#set({ name: file.name, type, file });
    const size = file.size / 1e6;
    if (file.size > ACCEPTED_BYTES) say(byId("image-note"), "image.tooLarge", { size });
    else say(byId("image-note"), "image.chosen", { name: file.name });
    await this.#preview(choice);
  }

  #chooseUrl(text) {
    if (this.#refusedAsBusy()) return;
    const url = text.trim();
    if (!ADDRESS.test(url)) {
      say(byId("image-note"), "image.url.invalid");
      return;
    }
    this.#choice++;
    byId("image-url").value = url;
    this.#set(url ? { url } : null);
    if (url) say(byId("image-note"), "image.url.hint");
    else sayPlain(byId("image-note"));
  }

  #refusedAsBusy() {
    if (this.#busy) say(byId("image-note"), "image.busy");
    return this.#busy;
  }

  #set(image) {
    URL.revokeObjectURL(byId("picture").src);
    this.image = image;
    this.#size = null;
    if (!image) byId("image-url").value = "";
    byId("preview").hidden = true;
    byId("remove").hidden = !image;
    const focused = byId("image-input").contains(document.activeElement);
    byId("image-input").hidden = Boolean(image?.file); // dropping and pasting another one still works
    if (focused && image?.file) byId("remove").focus();
    this.dispatchEvent(new Event("change"));
  }

  async #preview(choice) {
    const { name, type, file } = this.image;
    const [picture, overview] = [byId("picture"), byId("overview")];
    picture.src = URL.createObjectURL(file);
    try {
      await picture.decode();
    } catch {
      if (choice === this.#choice && file.size <= ACCEPTED_BYTES) {
        say(byId("image-note"), "image.noPreview", { kind: type.slice("image/".length).toUpperCase() });
      }
      return;
    }
    if (choice !== this.#choice) return;
    overview.src = picture.src;
    this.#size = [picture.naturalWidth, picture.naturalHeight];
    const [width, height] = this.#size;
    if (file.size <= ACCEPTED_BYTES) {
      say(byId("image-note"), "image.file", { name, width, height, size: file.size / 1e6 });
    }
    byId("preview").hidden = false;
    this.#drawTiles();
  }

  /** The image on the model's canvas, black borders and cuts included; or the image alone. */
  #drawTiles() {
    const shown = byId("show-tiles").checked;
    const { resolution, grid, fitted, offset, imageTokens } = tileLayout(this.#size);
    const [canvas, place, corner] = shown ? [resolution, fitted, offset] : [this.#size, this.#size, [0, 0]];
    byId("stage").style.setProperty("--ratio", canvas[0] / canvas[1]);
    Object.assign(byId("picture").style, {
      left: percent(corner[0], canvas[0]),
      top: percent(corner[1], canvas[1]),
      width: percent(place[0], canvas[0]),
      height: percent(place[1], canvas[1]),
    });
    byId("tiles").hidden = byId("model-view").hidden = !shown;
    byId("tiles").style.setProperty("--columns", grid[0]);
    const count = grid[0] * grid[1];
    byId("tiles").replaceChildren(
      ...Array.from({ length: count }, (_, index) => {
        const tile = document.createElement("span");
        tile.appendChild(document.createElement("b")).textContent = index + 1;
        return tile;
      }),
    );
    const [[fittedWidth, fittedHeight], [columns, rows]] = [fitted, grid];
    say(byId("tiles-caption"), "tiles.caption", { fittedWidth, fittedHeight, columns, rows });
    say(byId("overview-caption"), "tiles.overview", { tiles: count + 1, tokens: imageTokens });
  }
}
