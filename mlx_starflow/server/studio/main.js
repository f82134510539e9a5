// The studio: views, theme, key, and the beginning of everything else.

import { post, Refused } from "./api.js";
import { $, $$, say } from "./dom.js";
import { startEdit } from "./edit.js";
import { onSend } from "./form.js";
import { deleteButton, startHistory } from "./history.js";
import { jobs } from "./jobs.js";
import { startLook } from "./look.js";
import { reuse, startMake } from "./make.js";
import { models } from "./models.js";
import { startQueue } from "./queue.js";
import { offer, offerControl } from "./viewer.js";

const VIEWS = ["make", "edit", "look"];
const THEMES = ["auto", "light", "dark"];

/** Shows a view; its name is the address's fragment, so that a reload keeps it. */
function open(name) {
  const chosen = VIEWS.includes(name) ? name : "make";
  for (const each of VIEWS) {
    const tab = $(`#tab-${each}`);
    tab.setAttribute("aria-selected", `${each === chosen}`);
    tab.tabIndex = each === chosen ? 0 : -1;
    $(`#${each}`).hidden = each !== chosen;
  }
  if (location.hash !== `#${chosen}`) window.history.replaceState(null, "", `#${chosen}`);
  window.scrollTo(0, 0);
}

function startTabs() {
  const tabs = $$('[role="tab"]');
  tabs.forEach((tab, at) => {
    tab.onclick = () => open(VIEWS[at]);
    tab.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (at + step + VIEWS.length) % VIEWS.length;
      open(VIEWS[next]);
      tabs[next].focus();
    };
  });
  window.addEventListener("hashchange", () => open(location.hash.slice(1)));
  open(location.hash.slice(1));
}

function startTheme() {
  const button = $("#theme");
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
    button.setAttribute("aria-label", `Colours: ${theme}`);
    localStorage.setItem("theme", theme);
  };
  button.onclick = () => {
    const at = THEMES.indexOf(document.documentElement.dataset.theme);
    show(THEMES[(at + 1) % THEMES.length]);
  };
  const kept = localStorage.getItem("theme");
  show(THEMES.includes(kept) ? kept : "auto");
}

/** Asks for the key until it is right. */
function askForKey() {
  const dialog = $("#key");
  const form = $("#key-form");
  dialog.oncancel = (event) => event.preventDefault();
  dialog.showModal();
  return new Promise((resolve) => {
    onSend(form, async () => {
      await post("/api/session", { key: form.elements.key.value });
      dialog.close();
      resolve();
    });
  });
}

async function connect() {
  try {
    await models.start();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status !== 401) {
      say($("#lost"), error.message);
      throw error;
    }
    await askForKey();
    await models.start();
  }
}

async function start() {
  startTheme();
  startTabs();
  startQueue();
  await connect();
  offer("Use its settings", (item) => {
    open("make");
    reuse(item);
  });
  startEdit(open);
  startLook(open);
  offerControl(deleteButton);
  await Promise.all([jobs.start(), startHistory()]);
  startMake();
  document.documentElement.dataset.ready = "true";
}

start();
