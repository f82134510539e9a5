// Forms: their values as the server wants them, and its sentences beside the fields that they are about.

import { Refused } from "./api.js";
import { $, $$, el, say } from "./dom.js";

/** What a form's fields say; those that are empty, or do not apply, are left out. Throws Refused. */
export function valuesOf(form) {
  const values = {};
  for (const field of form.elements) {
    if (!field.name || field.closest("[hidden]")) continue;
    const value = field.type === "checkbox" ? field.checked : field.value.trim();
    if (value === "" && !field.validity.badInput) continue;
    values[field.name] = field.dataset.type ? numberOf(field, value) : value;
  }
  return values;
}

function numberOf(field, value) {
  const read = Number(value);
  const whole = field.dataset.type === "integer";
  if (value === "" || !Number.isFinite(read) || (whole && !Number.isSafeInteger(read))) {
    throw new Refused({ message: whole ? "a whole number is wanted here" : "a number is wanted here", param: field.name }, 0);
  }
  return read;
}

/** Takes back what was said. */
export function clearErrors(form) {
  for (const field of $$("[aria-invalid]", form)) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  for (const place of $$(".error.own", form)) place.remove();
  say($(":scope > .error", form), "");
}

/** Says what is wrong: beside the field if it is one's, else above the button. */
export function showError(form, error) {
  const name = (error.field ?? "").split(".")[0];
  const field = name ? form.elements[name] : null;
  if (!(field instanceof HTMLElement) || field.closest("[hidden]")) {
    say($(":scope > .error", form), error.message);
    return;
  }
  const sentence = error.message.replace(`${error.field}: `, "");
  const place = el("p", { class: "error own", role: "alert", id: `${form.id}-${name}-error` });
  say(place, sentence);
  field.closest("details")?.setAttribute("open", "");
  (field.closest(".row") ?? field.closest("label") ?? field).after(place);
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", place.id);
  field.focus();
}

/** Calls `send` when a form is sent, by its button or with Ctrl and Enter; what it throws is shown in the form. */
export function onSend(form, send) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    clearErrors(form);
    try {
      await send(event);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      showError(form, error);
    }
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  for (const output of $$("output", form)) {
    const range = $("input", output.parentElement);
    const show = () => (output.value = range.value);
    range.addEventListener("input", show);
    show();
  }
}
