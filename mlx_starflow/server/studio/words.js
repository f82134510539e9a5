// How things are said: numbers, jobs, pictures, and what each finding means.

const VERBS = {
  generate: "Making",
  preview: "Previewing",
  video: "Filming",
  score: "Scoring",
  classify: "Classifying",
  encode: "Encoding",
  decode: "Decoding",
  reprompt: "Re-prompting",
  vary: "Varying",
  interpolate: "Interpolating",
  inpaint: "Inpainting",
};

/** What a job does, in a few words. */
export function doing(job) {
  const verb = VERBS[job.kind] ?? job.kind;
  const about = job.about ?? {};
  const what = about.prompt || about.target || "";
  return what ? `${verb} “${shortened(what, 60)}”` : verb;
}

export function progressWords(progress) {
  if (!progress?.phase) return "begins";
  const block = progress.block === null ? "" : `, block ${progress.block}`;
  const count = progress.total ? `: ${progress.done} of ${progress.total} ${progress.unit}` : "";
  return `${progress.phase}${block}${count}`;
}

export function shortened(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** A number with so many significant digits, small and large ones with powers of ten. */
export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e6) return Number(value.toPrecision(digits)).toLocaleString("en", {
    maximumSignificantDigits: Math.max(digits, size >= 1 ? Math.floor(Math.log10(size)) + 1 : digits),
  });
  const [mantissa, exponent] = value.toExponential(1).split("e");
  return `${mantissa}·10${[...`${Number(exponent)}`].map((digit) => SUPERSCRIPTS[digit]).join("")}`;
}

export function signed(value, digits = 3) {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits).replace("-", "−");
}

export function when(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/** What a picture of the gallery shows, as far as its file says. */
export function titleOf(item) {
  const prompts = (item.metadata.prompts ?? []).filter(Boolean);
  return prompts.join(" → ") || (item.metadata.made_by ?? "untitled");
}

/** What a file says about how it was made: names and values, as texts. */
export function facts(item) {
  const { prompts = [], seeds = [], settings = {}, certificate, upscaled, version, made_by: by, ...others } = item.metadata;
  const found = { Prompt: prompts.filter(Boolean).join(" → ") || "none" };
  if (seeds.length) found.Seed = seeds.join(", ");
  if (by) found["Made by"] = by;
  found.Size = `${item.width}×${item.height}`;
  for (const [name, value] of Object.entries({ ...others, ...settings })) {
    if (value === null || ["size", "version"].includes(name)) continue;
    const title = name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");
    found[title] = typeof value === "number" ? number(value, 4) : typeof value === "object" ? JSON.stringify(value) : `${value}`;
  }
  if (upscaled) found.Enlarged = upscaled.map(({ scale, file }) => `${scale} times by ${file}`).join(", ");
  if (certificate) found.Certificate = `largest error ${number(certificate.max)}, RMS ${number(certificate.rms)}`;
  found.Made = when(item.created);
  return found;
}

/** What one learns from each finding, in one sentence. */
export const MEANS = {
  nll: "The exact negative log-likelihood: how many nats this picture costs the model; lower is more likely.",
  typicality:
    "How far the likelihood is from that of the training pictures: within 2 is usual, and far below is as unusual as far above.",
  surprise: "Where the nats come from: light parts are what the model did not expect there.",
  labels: "How probable each label is by Bayes' rule, if one of them is right and all are equally likely beforehand.",
  noise:
    "What the flow turns the picture into, and back: a usual picture becomes even noise, and shapes that stay are what the model cannot explain.",
  certificate:
    "The sampler's proof: what it made was turned into noise again, and this is how far that is from the noise it was drawn from.",
};
