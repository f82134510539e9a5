// The bar at the foot of the page: what runs, what waits, and the button that ends it.

import { $, button, el, say } from "./dom.js";
import { jobs } from "./jobs.js";
import { doing, progressWords } from "./words.js";

const now = $("#now");
const bar = $("#bar");
const waiting = $("#waiting");
const cancel = $("#cancel");

function show() {
  const { running, waiting: line } = jobs;
  say($("#lost"), jobs.lost);
  const current = running ?? line[0] ?? null;
  cancel.disabled = current === null;
  cancel.onclick = () => {
    cancel.disabled = true;
    jobs.cancel(current.id);
  };
  const progress = running && (jobs.progress ?? running.progress);
  now.replaceChildren(
    ...(current
      ? [el("b", {}, doing(current)), el("span", { class: "far" }, running ? progressWords(progress) : "is next")]
      : ["Idle"]),
  );
  if (running && !progress.total) bar.removeAttribute("value");
  else bar.value = running ? progress.done / progress.total : 0;
  const others = running ? line : line.slice(1);
  $("summary", waiting).textContent = `${others.length} waiting`;
  $("ul", waiting).replaceChildren(
    ...others.map((job) =>
      el("li", {}, el("span", {}, doing(job)), button("Cancel", () => jobs.cancel(job.id), {
        "aria-label": `Cancel ${doing(job)}`,
      })),
    ),
  );
  if (!others.length) waiting.open = false;
}

export function startQueue() {
  jobs.addEventListener("change", show);
  show();
}
