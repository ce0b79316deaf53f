"use strict";
(() => {
  const form = document.getElementById("study"), study = form.dataset.study, place = "ibxai-reader-study-" + study;
  const questions = [...document.querySelectorAll(".question")], parts = ["choice", "left", "right"];
  const element = id => document.getElementById(id);
  const chosen = (question, part) => form.querySelector(`[name="${question.id}-${part}"]:checked`)?.value ?? null;
  const complete = question => parts.every(part => chosen(question, part) !== null);
  let shown = 0, started = new Date().toISOString();

  function answers() {
    const found = {};
    for (const question of questions) {
      const [choice, left, right] = parts.map(part => chosen(question, part));
      if (choice !== null) found[question.id] = { choice, left: left && Number(left), right: right && Number(right) };
    }
    return { study, reader: element("reader").value.trim(), started, saved: new Date().toISOString(), answers: found };
  }

  function keep() {
    try { localStorage.setItem(place, JSON.stringify(answers())); }
    catch { element("forgets").hidden = false; }
  }

  function restore() {
    let kept = null;
    try { kept = JSON.parse(localStorage.getItem(place)); } catch { /* as if there were none: `keep` will say so */ }
    if (!kept) return;
    element("reader").value = kept.reader;
    started = kept.started;
    for (const [id, answer] of Object.entries(kept.answers))
      for (const part of parts) {
        const option = form.querySelector(`[name="${id}-${part}"][value="${answer[part]}"]`);
        if (option) option.checked = true;
      }
    shown = Math.max(questions.findIndex(question => !complete(question)), 0);
  }

  function show() {
    questions.forEach((question, place) => {
      question.hidden = place !== shown;
      for (const score of question.querySelectorAll(".score")) score.disabled = chosen(question, "choice") === null;
    });
    const done = questions.filter(complete).length;
    element("progress").value = `${done} of ${questions.length} answered`;
    element("back").disabled = shown === 0;
    element("next").disabled = shown === questions.length - 1;
  }

  function say(text) {
    element("said").hidden = false;
    element("said").textContent = text;
  }

  function save() {
    const found = answers(), missing = questions.findIndex(question => !complete(question));
    if (!found.reader) { say("Give your name or initials first."); return element("reader").focus(); }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(found, null, 1)], { type: "application/json" }));
    link.download = `answers-${found.reader.replace(/[^\p{L}\p{N}]+/gu, "-")}-${study}.json`;
    link.click();
    say(missing < 0 ? `Saved as ${link.download}.` : `Saved as ${link.download}, without an answer to page ${missing + 1}.`);
  }

  function clear() {
    if (!confirm("All answers on this page go. Have they been saved as a file?")) return;
    try { localStorage.removeItem(place); } catch { /* nothing was kept */ }
    form.reset();
    element("said").hidden = true;
    [shown, started] = [0, new Date().toISOString()];
    show();
  }

  function turn(step) {
    shown += step;
    show();
    scrollTo(0, 0);
  }

  form.addEventListener("input", () => { keep(); show(); });
  form.addEventListener("submit", event => event.preventDefault());
  element("back").addEventListener("click", () => turn(-1));
  element("next").addEventListener("click", () => turn(1));
  element("save").addEventListener("click", save);
  element("afresh").addEventListener("click", clear);
  restore();
  show();
  keep();
})();
