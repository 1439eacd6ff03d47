"use strict";
const study = JSON.parse(document.getElementById("study").textContent);
const $ = id => document.getElementById(id);
const place = `reader-study ${study.study} ${study.rater}`;
const columns = ["study", "key", "rater", "position", "id", "answer", ...study.questions.map(q => q.name), "check"];
const sections = ["start", "reading", "end"];
// Answers to image i: [1 to 6, then 1 to 5 for each question]; null where not yet given.
let answers = study.images.map(() => [null, ...study.questions.map(() => null)]);
let at = 0, furthest = 0, unsaved = false;

// Some browsers keep nothing for a file, and say so by throwing.
function keep() {
  unsaved = true;
  try { localStorage.setItem(place, JSON.stringify({ answers, furthest })); return true; } catch { return false; }
}
function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(place));
    if (kept && kept.answers.length === answers.length) ({ answers, furthest } = kept);
    return true;
  } catch { return false; }
}

const whole = row => row.every(value => value !== null);
const done = () => answers.filter(whole).length;

// CRC-32, as zlib has it: it finds a row that a spreadsheet changed, not one that somebody forged.
function crc32(text) {
  let crc = ~0;
  for (const byte of new TextEncoder().encode(text)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

function csv() {
  const rows = answers.map((row, i) => [row, [study.study, study.key, study.rater, i + 1, study.images[i].id, ...row]])
    .filter(([row]) => whole(row))
    .map(([, cells]) => [...cells, crc32(cells.join("|"))].join(","));
  return [columns.join(","), ...rows].join("\r\n") + "\r\n";
}

function download() {
  const link = document.createElement("a");
  const part = done() < answers.length ? "-part" : "";
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  link.download = `answers-${study.study}-${study.rater}${part}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  unsaved = false;
  return link.download;
}

function restore(text) {
  const rows = text.replace(/^\ufeff/, "").split(/\r?\n/).filter(line => line.trim())
    .map(line => line.split(/[,;\t]/).map(cell => cell.trim().replace(/^"|"$/g, "")));
  const head = rows.shift() || [];
  if (columns.some((name, i) => head[i] !== name)) return "This is not a file of answers to this form.";
  const found = study.images.map(() => [null, ...study.questions.map(() => null)]);
  for (const [i, row] of rows.entries()) {
    const at = study.images.findIndex(image => image.id === row[4]);
    const values = row.slice(5, -1).map(Number);
    const ends = values.map((_, j) => j ? study.points : study.levels.length);
    if (row[0] !== study.study || row[1] !== study.key) return "These answers belong to another study.";
    if (row[2] !== study.rater) return `These answers belong to ${row[2]}; this form is for ${study.rater}.`;
    if (at < 0 || values.length !== found[0].length || values.some((v, j) => !(Number.isInteger(v) && v >= 1 && v <= ends[j]))
      || String(crc32([...row.slice(0, 3), at + 1, row[4], ...values].join("|"))) !== row.at(-1))
      return `Row ${i + 2} was changed after this form wrote it. Choose the file as it was saved.`;
    found[at] = values;
  }
  answers = found;
  const first = answers.findIndex(row => !whole(row));
  furthest = first < 0 ? answers.length : first;
  keep();
  return "";
}

function show(section) {
  for (const name of sections) $(name).hidden = name !== section;
  document.body.className = section;
  $("progress").max = answers.length;
  $("progress").value = done();
  $("place").textContent = section === "reading" ? `${study.rater}: ${at + 1} of ${answers.length}` : study.rater;
  scrollTo(0, 0);
}

function option(parent, name, value, text) {
  const box = document.createElement("div"), input = document.createElement("input"), label = document.createElement("label");
  const number = document.createElement("b");
  box.className = "option";
  Object.assign(input, { type: "radio", name, value, id: `${name}-${value}` });
  label.htmlFor = input.id;
  number.textContent = value;
  label.append(number, text);
  box.append(input, label);
  parent.append(box);
}

function build() {
  study.levels.forEach((text, i) => option($(i < 3 ? "real" : "synthetic"), "answer", i + 1, text));
  for (const question of study.questions) {
    const field = document.createElement("fieldset"), legend = document.createElement("legend");
    const keys = document.createElement("div"), ends = document.createElement("div");
    field.id = `field-${question.name}`;
    legend.textContent = question.text;
    keys.className = "keys scale";
    ends.className = "ends";
    for (let i = 1; i <= study.points; i++) option(keys, question.name, i, "");
    for (const word of ["not at all", "fully"]) ends.append(Object.assign(document.createElement("span"), { textContent: word }));
    field.append(legend, keys, ends);
    $("questions").append(field);
  }
}

const names = ["answer", ...study.questions.map(q => q.name)];
const fields = () => [$("choice"), ...study.questions.map(q => $(`field-${q.name}`))];

// Number keys answer the first question without an answer; when all have one, the question in focus, or the last.
function current() {
  const open = answers[at].indexOf(null), focused = names.indexOf(document.activeElement.name);
  return open >= 0 ? open : focused >= 0 ? focused : names.length - 1;
}

function mark() {
  const row = answers[at];
  names.forEach((name, j) => {
    for (const input of document.getElementsByName(name)) input.checked = Number(input.value) === row[j];
  });
  fields().forEach((field, j) => field.classList.toggle("now", names.length > 1 && j === current()));
  $("next").disabled = !whole(row);
  $("back").disabled = at === 0 || at < furthest;
  $("progress").value = done();
}

function open(i) {
  at = i;
  const image = study.images[i];
  $("image").src = `data:image/jpeg;base64,${image.data}`;
  if ($("prompt")) $("prompt").textContent = image.prompt;
  $("hint").textContent = "";
  show("reading");
  mark();
  $("choice").focus({ preventScroll: true });
}

function answer(j, value) {
  answers[at][j] = value;
  $("hint").textContent = keep() ? "" : "This browser keeps nothing for a file: save what you have before you close it.";
  mark();
}

function next() {
  if (!whole(answers[at])) {
    $("hint").textContent = "Answer first; if you cannot tell, guess.";
    return;
  }
  furthest = Math.max(furthest, at + 1);
  keep();
  if (at + 1 < answers.length) open(at + 1);
  else { show("end"); $("save").focus(); }
}

function back() {
  // One image at most, to mend a slip: a longer way back would let a rater compare images.
  if (at > 0 && at >= furthest) open(at - 1);
}

build();
const keeps = recall();
$("count").textContent = answers.length;
$("kept").textContent = keeps
  ? "Your answers are kept in this browser, so you may close this page and go on later."
  : "This browser keeps nothing for a file: save what you have before you close this page.";
if (furthest) {
  $("resumed").hidden = false;
  $("resumed").textContent = `Welcome back: ${done()} of ${answers.length} images are answered.`;
  $("begin").textContent = "Go on";
}
show("start");
$("begin").focus({ preventScroll: true });

$("begin").addEventListener("click", () => furthest < answers.length ? open(furthest) : show("end"));
$("answers").addEventListener("change", event => answer(names.indexOf(event.target.name), Number(event.target.value)));
$("answers").addEventListener("submit", event => { event.preventDefault(); next(); });
$("back").addEventListener("click", back);
$("reopen").addEventListener("click", () => open(answers.length - 1));
$("save").addEventListener("click", () => { $("saved").textContent = `Saved as ${download()}. Look in this browser's downloads.`; });
$("pause").addEventListener("click", () => { $("hint").textContent = `Saved as ${download()}.`; });
$("forget").addEventListener("click", () => {
  if (!confirm("Remove the answers from this browser? Save them first.")) return;
  try { localStorage.removeItem(place); } catch { /* nothing was kept */ }
  unsaved = false;
  location.reload();
});
$("upload").addEventListener("change", async event => {
  const file = event.target.files[0];
  if (!file) return;
  const problem = restore(await file.text());
  $("upload-result").textContent = problem || `Read: ${done()} of ${answers.length} images are answered.`;
  if (!problem) { $("begin").textContent = "Go on"; $("begin").focus(); }
  show("start");
});
document.addEventListener("keydown", event => {
  if ($("reading").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const j = current(), most = j ? study.points : study.levels.length;
  if (/^[1-9]$/.test(event.key) && Number(event.key) <= most) answer(j, Number(event.key));
  else if (event.key === "ArrowRight") next();
  else if (event.key === "ArrowLeft") back();
  else if (event.key === "Enter" && !event.target.closest("button")) next();
  else return;
  event.preventDefault();
});
addEventListener("beforeunload", event => { if (unsaved && !keeps) event.preventDefault(); });
