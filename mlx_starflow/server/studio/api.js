// Talking to the server: JSON there and back, and one sentence where it says no.

/** What the server refused: `message` is one sentence, `field` names the field that is wrong, or is null. */
export class Refused extends Error {
  constructor(error, status) {
    super(error.message);
    this.field = error.param ?? null;
    this.code = error.code ?? null;
    this.status = status;
  }
}

export const UNREACHABLE = "The server does not answer: is mlx-starflow serve still running?";

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
  } catch {
    const code = options.signal?.aborted ? "aborted" : "unreachable";
    throw new Refused({ message: UNREACHABLE, code }, 0);
  }
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    throw new Refused(told.error ?? { message: `The server answered with ${answer.status}.` }, answer.status);
  }
  return told;
}

export const get = (path) => ask(path);
export const remove = (path) => ask(path, { method: "DELETE" });
export const post = (path, values, signal) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values), signal });

/** Waits for something whose failing is said elsewhere, as that of a server which does not answer is. */
export async function quietly(promise) {
  try {
    await promise;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
  }
}

/** A file as a data URL, which the server takes for a picture. */
export function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refused({ message: "The file cannot be read." }, 0));
    reader.readAsDataURL(file);
  });
}
