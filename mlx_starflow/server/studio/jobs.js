// Jobs: sending them off, following the one that runs, and knowing which ones wait.
//
// A browser opens six connections to a server at most, so only the job that runs has a stream of events; the others
// are in the list, which is asked for now and then.

import { get, post, quietly, remove, Refused } from "./api.js";

const BUSY = 1500; // ms between two looks at the list while something runs or waits
const IDLE = 5000;
const ENDS = ["done", "failed", "cancelled"];
const EVENTS = ["state", "progress", "preview", "picture", "frame", ...ENDS];

/**
 * The server's jobs. Tells "change" when the list or the progress has changed, "picture" when a picture is finished
 * and "ended" when a job is.
 */
class Jobs extends EventTarget {
  list = [];
  progress = null;
  lost = "";
  #watchers = new Map();
  #ended = null;
  #stream = null;
  #timer = 0;
  #looks = 0;

  /** Begins to look, and does so whenever the page is looked at. */
  start() {
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) {
        this.#unfollow();
        clearTimeout(this.#timer);
      } else {
        this.look();
      }
    });
    return this.look();
  }

  /** Sends a job off. The watcher's methods are called by the names of its events. Throws Refused. */
  async submit(path, values, watcher) {
    const { job } = await post(`${path}?mode=background`, values);
    this.watch(job, watcher);
    this.look();
    return job;
  }

  watch(job, watcher) {
    this.#watchers.set(job.id, watcher);
    watcher.state?.({ job });
  }

  async cancel(id) {
    await quietly(remove(`/api/jobs/${id}`));
    await this.look();
  }

  get running() {
    return this.list.find((job) => job.state === "running") ?? null;
  }

  /** Those that wait, the next one first. */
  get waiting() {
    return this.list.filter((job) => job.state === "queued").sort((a, b) => a.position - b.position);
  }

  async look() {
    clearTimeout(this.#timer);
    const look = ++this.#looks;
    const watched = [...this.#watchers.keys()]; // what is sent off meanwhile need not be in the answer
    try {
      const told = await get("/api/jobs");
      if (look !== this.#looks) return;
      [this.list, this.lost] = [told.jobs, ""];
      this.#settle(watched);
      const next = this.running ?? this.waiting[0];
      if (next && !document.hidden) this.#follow(next);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (error.status === 401) location.reload(); // a server that was started again wants the key again
      this.lost = error.message;
    }
    this.#changed();
    if (!document.hidden) {
      this.#timer = setTimeout(() => this.look(), this.running || this.waiting.length ? BUSY : IDLE);
    }
  }

  /** Tells of jobs that have ended without having been followed. */
  #settle(watched) {
    const known = new Map(this.list.map((job) => [job.id, job]));
    const ended = new Set(this.list.filter((job) => ENDS.includes(job.state)).map((job) => job.id));
    const news = this.#ended !== null && [...ended].some((id) => !this.#ended.has(id));
    this.#ended = ended;
    for (const id of watched) {
      if (!known.has(id)) this.#end(id, "failed", { error: { message: "The server has forgotten this job." } });
      else if (ended.has(id)) this.#fetch(id);
    }
    if (news) this.dispatchEvent(new Event("ended"));
  }

  async #fetch(id) {
    const watcher = this.#watchers.get(id);
    this.#watchers.delete(id);
    try {
      const { job, result } = await get(`/api/jobs/${id}`);
      for (const picture of result?.pictures ?? []) watcher?.picture?.(picture);
      watcher?.[job.state]?.({ job, result, error: job.error });
    } catch (error) {
      watcher?.failed?.({ error });
    }
  }

  #end(id, name, data) {
    const watcher = this.#watchers.get(id);
    this.#watchers.delete(id);
    watcher?.[name]?.(data);
  }

  #follow(job) {
    if (this.#stream?.id === job.id) return;
    this.#unfollow();
    const source = new EventSource(`/api/jobs/${job.id}/events`);
    this.#stream = { id: job.id, source };
    for (const name of EVENTS) source.addEventListener(name, (event) => this.#told(job.id, name, JSON.parse(event.data)));
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED && this.#stream?.source === source) this.#unfollow();
    };
  }

  #unfollow() {
    this.#stream?.source.close();
    [this.#stream, this.progress] = [null, null];
  }

  #told(id, name, data) {
    if (ENDS.includes(name)) {
      this.#unfollow();
      this.#ended?.add(id);
      this.#end(id, name, data);
      this.dispatchEvent(new Event("ended"));
      this.look();
      return;
    }
    if (name === "picture") this.dispatchEvent(new CustomEvent("picture", { detail: data }));
    if (name === "state") this.list = this.list.map((job) => (job.id === id ? data.job : job));
    if (name === "progress") this.progress = data;
    this.#watchers.get(id)?.[name]?.(data);
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

export const jobs = new Jobs();
