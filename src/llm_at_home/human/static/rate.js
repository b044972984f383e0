"use strict";
// Saves grades in the background. What the server has not confirmed waits here, in the browser's own storage as well,
// and is sent again until it is confirmed. Without this script the page is a plain form.
(() => {
  const FIRST_WAIT = 500, LONGEST_WAIT = 5000, TIMEOUT = 10000, TYPING_PAUSE = 800;
  const form = document.querySelector("form[data-rating]");
  const state = document.getElementById("state");
  const base = location.pathname.replace(/[^/]*$/, "");
  const storageKey = "unsaved " + base;
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

  const waiting = readWaiting();
  let sending = false;
  let failing = false;
  let leaving = false;
  let refused = "";
  let confirmed = state.textContent !== "";

  function readWaiting() {
    try {
      return new Map(JSON.parse(localStorage.getItem(storageKey) || "[]"));
    } catch {
      return new Map();
    }
  }

  function keepWaiting() {
    try {
      if (waiting.size) localStorage.setItem(storageKey, JSON.stringify([...waiting]));
      else localStorage.removeItem(storageKey);
    } catch {
      // Storage may be full or forbidden; what waits is then kept as long as the page is open.
    }
  }

  function show() {
    const labels = [...waiting.values()].map((entry) => entry.label);
    let text = "";
    if (refused) text = refused;
    else if (failing) {
      text = "Not saved yet: " + labels.join("; ") + ". The server does not answer. Trying again; keep this page open.";
    } else if (waiting.size) text = "Saving …";
    else if (leaving && state.dataset.offline) text = "The server does not answer. Trying again …";
    else if (confirmed) text = "Saved";
    // A screen reader speaks each change, so the same text is not set twice.
    if (state.textContent !== text) state.textContent = text;
    state.classList.toggle("unsaved", Boolean(refused) || failing || (leaving && Boolean(state.dataset.offline)));
  }

  async function request(url, options) {
    const abort = new AbortController();
    const timer = setTimeout(() => abort.abort(), TIMEOUT);
    try {
      const response = await fetch(url, { ...options, signal: abort.signal, cache: "no-store" });
      if (response.status >= 500 || response.status === 429) throw new Error("status " + response.status);
      return response;
    } finally {
      clearTimeout(timer);
    }
  }

  async function send(position, entry) {
    const response = await request(base + position, {
      method: "POST",
      keepalive: true, // a page that is closed still sends what it began to
      headers: { Accept: "application/json" },
      body: new URLSearchParams({ grade: entry.grade, comment: entry.comment, form_token: entry.formToken }),
    });
    const reply = await response.json();
    if (!response.ok) return { problem: reply.problem || "status " + response.status };
    return reply;
  }

  async function flush() {
    if (sending) return;
    sending = true;
    let wait = FIRST_WAIT;
    while (waiting.size) {
      const [position, entry] = waiting.entries().next().value;
      try {
        const reply = await send(position, entry);
        failing = false;
        wait = FIRST_WAIT;
        // Only what was sent is settled: the person may have changed it meanwhile.
        if (waiting.get(position) === entry) waiting.delete(position);
        keepWaiting();
        if (reply.problem) refused = "Not saved: " + entry.label + ". " + reply.problem;
        else settled(position, reply);
        show();
      } catch {
        failing = true;
        show();
        await pause(wait);
        wait = Math.min(2 * wait, LONGEST_WAIT);
      }
    }
    sending = false;
    show();
  }

  function settled(position, reply) {
    if (!form) return;
    document.getElementById("progress").value = reply.graded;
    document.getElementById("count").textContent = reply.graded + " of " + reply.of + " graded";
    if (position === form.dataset.position) confirmed = true;
  }

  addEventListener("beforeunload", (event) => {
    if (waiting.size) event.preventDefault();
  });
  show();

  if (!form) {
    // The overview was rendered before what waited was saved, so it is loaded again.
    if (waiting.size) flush().then(() => { if (!refused) location.reload(); });
    return;
  }

  const position = form.dataset.position;
  const comment = form.elements.comment;
  const next = document.getElementById("next");
  const nextLabel = next.textContent;
  let kept = { grade: form.elements.grade.value, comment: comment.value };

  const unsaved = waiting.get(position);
  if (unsaved) {
    form.elements.grade.value = unsaved.grade;
    comment.value = unsaved.comment;
    kept = { grade: unsaved.grade, comment: unsaved.comment };
  }
  labelNext();
  flush();

  function labelNext() {
    const skip = !form.elements.grade.value;
    next.textContent = skip ? "Skip" : nextLabel;
    next.classList.toggle("quiet", skip);
  }

  function save() {
    const now = { grade: form.elements.grade.value, comment: comment.value };
    if (now.grade === kept.grade && now.comment === kept.comment) return;
    kept = now;
    // A comment that was taken away again before any grade is nothing to keep.
    if (!now.grade && !now.comment.trim() && !comment.defaultValue && !confirmed) {
      waiting.delete(position);
    } else {
      waiting.set(position, { ...now, label: form.dataset.label, formToken: form.elements.form_token.value });
    }
    refused = "";
    keepWaiting();
    labelNext();
    show();
    flush();
  }

  // A page that is opened while the server is away would be the browser's error page, so it is asked for first.
  async function go(url) {
    if (leaving) return;
    save();
    leaving = true;
    for (let wait = FIRST_WAIT; ; wait = Math.min(2 * wait, LONGEST_WAIT)) {
      if (refused) break;
      if (!waiting.size) {
        try {
          await request(url, {});
          location.assign(url);
          return;
        } catch {
          state.dataset.offline = "yes";
          show();
        }
      }
      await pause(waiting.size ? 50 : wait);
    }
    leaving = false;
    show();
  }

  let typing = 0;
  form.addEventListener("change", save);
  comment.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(save, TYPING_PAUSE);
  });
  // What was typed within the pause before the page is left or the phone put away.
  addEventListener("pagehide", save);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) save();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(form.dataset.next);
  });
  for (const link of document.querySelectorAll("a[data-go]")) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      go(link.getAttribute("href"));
    });
  }
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
    const inText = event.target === comment;
    if (!inText && /^[1-5]$/.test(event.key)) {
      form.elements.grade.value = event.key;
      save();
    } else if (event.key === "Enter" && !inText && !event.target.closest("a, button, input")) {
      event.preventDefault();
      go(form.dataset.next);
    }
  });
  // A page that the browser kept from before may show what has changed since.
  addEventListener("pageshow", (event) => {
    if (event.persisted) location.reload();
  });
})();
