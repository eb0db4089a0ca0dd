// Where the model looks: the geometry of pulse_ecg/anyres.py, number for number, with PULSE-7B's own figures.
// Sizes are [width, height] in pixels; a grid is [columns, rows].

export const TILE = 336;
const TOKENS_PER_TILE = 576;
const PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]];

/** The pinpoint that keeps most of the image's pixels; then the one that wastes least; the first wins a tie. */
export function selectResolution([width, height]) {
  let best = PINPOINTS[0];
  let mostKept = 0;
  let leastWasted = Infinity;
  for (const [columns, rows] of PINPOINTS) {
    const scale = Math.min(columns / width, rows / height);
    const kept = Math.min(Math.trunc(width * scale) * Math.trunc(height * scale), width * height);
    const wasted = columns * rows - kept;
    if (kept > mostKept || (kept === mostKept && wasted < leastWasted)) {
      best = [columns, rows];
      mostKept = kept;
      leastWasted = wasted;
    }
  }
  return best;
}

/** The size of the image scaled to fit `resolution` with its aspect kept, rounded up. */
export function fittedSize([width, height], [columns, rows]) {
  const [scaleW, scaleH] = [columns / width, rows / height];
  return scaleW < scaleH
    ? [columns, Math.min(Math.ceil(height * scaleW), rows)]
    : [Math.min(Math.ceil(width * scaleH), columns), rows];
}

/** The whole layout: the canvas, the grid on it, and where the image lies between its black borders. */
export function tileLayout(size) {
  const resolution = selectResolution(size);
  const fitted = fittedSize(size, resolution);
  const grid = resolution.map((edge) => edge / TILE);
  return {
    resolution,
    grid,
    fitted,
    offset: resolution.map((edge, axis) => Math.floor((edge - fitted[axis]) / 2)),
    imageTokens: (1 + grid[0] * grid[1]) * TOKENS_PER_TILE,
  };
}
