"use strict";
// One page, no libraries. Everything that comes from outside is shown as text (textContent), never as HTML.

const $ = (id) => document.getElementById(id);
const state = {
  hello: null, map: { path: [], here: null }, memory: null, status: null, history: [],
  live: null, drives: new Map(), // the newest goal, and its candidates' drives
  shown: null, shownDrives: null, // a past goal, when one is looked at
  came: 0, frame: 0, playing: true, socket: null, retry: 500,
};
const goal = () => state.shown || state.live;
const drives = () => (state.shown ? state.shownDrives : state.drives);

// --- connection -----------------------------------------------------------------------------------------------------
function connect() {
  const secure = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(`${secure}//${location.host}/live`);
  socket.binaryType = "blob";
  state.socket = socket;
  socket.onopen = () => {
    state.retry = 500;
    state.live = null; // a runtime that was started anew counts its goals from 1 again
    state.drives.clear();
    linked("connected", false);
  };
  socket.onmessage = (message) => {
    if (typeof message.data === "string") hear(JSON.parse(message.data));
    else camera(message.data);
  };
  socket.onclose = () => {
    linked("not connected: the runtime has ended, cannot be reached, or has too many viewers; trying again", true);
    setTimeout(connect, state.retry);
    state.retry = Math.min(state.retry * 1.6, 4000);
  };
}

function linked(text, lost) {
  $("link").textContent = text;
  $("link").classList.toggle("lost", lost);
  buttons();
}

function hear(m) {
  if (m.kind === "hello") { state.hello = m; hello(); }
  else if (m.kind === "status") { state.status = m; counts(); }
  else if (m.kind === "map") { state.map = m; drawMap(); }
  else if (m.kind === "memory") { state.memory = m; remembered(); }
  else if (m.kind === "history") { state.history = m.goals; past(); }
  else if (m.kind === "goal") {
    if (!state.live || state.live.number !== m.number) {
      // Drives of this goal may have come before it.
      for (const [index, d] of state.drives) if (d.goal !== m.number) state.drives.delete(index);
      state.frame = 0;
    }
    state.live = m;
    state.came = performance.now();
    if (!state.shown) draw();
    buttons();
  } else if (m.kind === "candidate") {
    picture(m.drive.url).then((image) => {
      if (state.live && m.goal < state.live.number) return;
      state.drives.set(m.candidate, { ...m, image });
      if (!state.shown) candidates();
    });
  } else if (m.kind === "reply") {
    $("reply").textContent = m.ok ? "" : m.reason;
    $("reply").classList.toggle("bad", !m.ok);
  }
}

function picture(url) {
  return new Promise((done) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => done(null);
    image.src = url;
  });
}

function hello() {
  const about = state.hello.about;
  $("robot").textContent = [about.robot, about.model].filter(Boolean).join(" · ");
  $("text").maxLength = state.hello.goal_chars_max;
  $("words").textContent = about.words.length ? `It knows the words ${about.words.join(", ")}.` : "";
  if (!state.hello.control) {
    $("reply").textContent = "Asking is switched off on this address (--view-control switches it on).";
  }
  buttons();
}

function buttons() {
  const open = state.socket && state.socket.readyState === WebSocket.OPEN && state.hello && state.hello.control;
  $("ask").querySelector("button[type=submit]").disabled = !open;
  $("text").disabled = !open;
  $("cancel").disabled = !(open && state.live && !state.live.over);
}

// --- camera ---------------------------------------------------------------------------------------------------------
let lastUrl = null;
function camera(blob) {
  const url = URL.createObjectURL(blob);
  const image = $("camera");
  image.onload = () => { if (lastUrl) URL.revokeObjectURL(lastUrl); lastUrl = url; };
  image.src = url;
  image.hidden = false;
  $("cameranote").textContent = "";
}

// --- the answer -----------------------------------------------------------------------------------------------------
const VERDICTS = {
  found: "Found.", not_in_context: "Not seen: no pose is given.", inconsistent: "Not believed: no pose is given.",
  stale: "Refused: what the camera shows is too old.", late: "Too late: the time was up.",
  cancelled: "Cancelled.", failed: "Failed: no pose is given.",
};
const fixed = (x, digits = 2) => (x == null ? "–" : x.toFixed(digits));

function verdict(g) {
  if (!g) return ["", ""];
  const a = g.answer;
  if (!a) {
    const last = g.stages.at(-1);
    const draft = g.draft && g.draft.pose ? ` First guess: x ${fixed(g.draft.pose.x)} m, y ${fixed(g.draft.pose.y)} m.` : "";
    return [last ? `Working: ${last[0]}${last[2] > 1 ? ` ${last[1]} of ${last[2]}` : ""} ...` : "Waiting ...", "", draft];
  }
  let words = VERDICTS[a.status] || a.status;
  if (a.status === "found" && a.pose) {
    const sigma = a.covariance ? Math.sqrt(a.covariance[0]) : null;
    const degrees = Math.round((a.pose.yaw * 180) / Math.PI);
    words = `Found: stand at x ${fixed(a.pose.x)} m, y ${fixed(a.pose.y)} m, facing ${degrees}°` +
      `${sigma == null ? "" : ` (± ${fixed(sigma)} m)`}`;
  }
  return [words, a.status === "found" ? "good" : "bad", a.reason || ""];
}

function draw() {
  const g = goal();
  $("asked").textContent = g ? `${state.shown ? "Earlier goal" : "Goal"}: “${g.words || g.id}”` : "Nothing has been asked yet.";
  const [words, kind, reason] = verdict(g);
  $("verdict").textContent = words;
  $("verdict").className = kind;
  $("reason").textContent = reason || "";
  times();
  parts();
  candidates();
  remembered();
  drawMap();
}

function times() {
  const g = goal();
  const bar = $("times");
  bar.replaceChildren();
  if (!g) { $("timesnote").textContent = ""; return; }
  const elapsed = g.over || g === state.shown ? g.elapsed_ms : g.elapsed_ms + (performance.now() - state.came);
  const whole = Math.max(g.deadline_ms || 0, elapsed, 1);
  let before = g.waited_ms || 0;
  const words = [];
  if (before >= 1) words.push(`waiting ${Math.round(before)} ms`);
  for (const [what, , , at] of g.stages) {
    const part = document.createElement("div");
    part.style.width = `${(100 * Math.max(at - before, 0)) / whole}%`;
    bar.append(part);
    words.push(`${what} ${Math.round(Math.max(at - before, 0))} ms`);
    before = Math.max(at, before);
  }
  const deadline = g.deadline_ms ? ` of ${Math.round(g.deadline_ms)} ms allowed` : "";
  $("timesnote").textContent = `${Math.round(elapsed)} ms${deadline}: ${words.join(", ")}`;
}

function parts() {
  const g = goal();
  const answer = g && (g.answer || g.draft);
  $("consistency").textContent = answer && answer.consistency != null ? fixed(answer.consistency) : "–";
  const items = (g && g.parts) || [];
  $("parts").replaceChildren(...items.map((part) => {
    const li = document.createElement("li");
    const value = part.value == null ? "not known" : fixed(part.value);
    li.append(`${part.what}: ${value} (counts ${part.weight})`);
    const bar = document.createElement("div");
    const fill = document.createElement("i");
    fill.style.width = `${100 * (part.value || 0)}%`;
    bar.append(fill);
    li.append(bar);
    return li;
  }));
}

// --- pictures side by side in one file ------------------------------------------------------------------------------
function frameOf(image, strip, index, canvas, scale = 1) {
  canvas.width = strip.width * scale;
  canvas.height = strip.height * scale;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  if (image) context.drawImage(image, index * strip.width, 0, strip.width, strip.height, 0, 0, canvas.width, canvas.height);
  return context;
}

function figure(image, strip, index, caption, used) {
  const f = document.createElement("figure");
  const canvas = document.createElement("canvas");
  frameOf(image, strip, index, canvas, 2);
  const text = document.createElement("figcaption");
  text.textContent = caption;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  f.append(canvas, text);
  f.classList.toggle("used", used);
  return f;
}

let memoryTurn = 0;
async function remembered() {
  const m = state.memory;
  const turn = ++memoryTurn;
  const g = goal();
  const used = new Set((g && g.used_index) || []);
  if (state.shown) {
    const image = await picture(g.used.url);
    if (turn !== memoryTurn) return;
    $("memory").replaceChildren(...g.used_index.slice(0, g.used.frames).map((index, i) => figure(image, g.used, i, `moment ${index}`, true)));
    $("memorynote").textContent = `The ${g.used_index.length} of ${g.remembered} moments that were used for this goal, as they are kept.`;
    return;
  }
  if (!m) return;
  const [image, gone] = await Promise.all([picture(m.pictures.url), picture(m.evicted_pictures.url)]);
  if (turn !== memoryTurn) return;
  const newest = m.moments.length ? m.moments.at(-1)[2] : 0;
  const caption = ([, , stamp]) => (newest - stamp < 0.05 ? "newest" : `${(newest - stamp).toFixed(1)} s before`);
  const strip = $("memory");
  const atEnd = strip.scrollLeft + strip.clientWidth >= strip.scrollWidth - 4;
  strip.replaceChildren(...m.moments.map((moment, i) => figure(image, m.pictures, i, caption(moment), used.has(moment[0]))));
  if (atEnd) strip.scrollLeft = strip.scrollWidth;
  $("evicted").replaceChildren(...m.evicted.map(([, why], i) => figure(gone, m.evicted_pictures, i, why, false)));
  if (!m.evicted.length) $("evicted").textContent = "none";
  $("memorynote").textContent = `${m.moments.length} moments` + (used.size ? `; framed: the ${used.size} that the newest goal used.` : ".");
}

function candidates() {
  const g = goal();
  const all = [...(drives() || new Map())].sort((a, b) => a[0] - b[0]);
  if (!g || !all.length) {
    $("candidates").textContent = g && g.over ? "No drive was imagined for this goal." : "None yet.";
    return;
  }
  $("candidates").replaceChildren(...all.map(([index, d]) => {
    const chosen = g.chosen === index;
    const rejected = g.over || g.chosen != null;
    const words = chosen ? "chosen" : rejected ? "not chosen" : d.steps ? `step ${d.step} of ${d.steps}` : "";
    return figure(d.image, d.drive, d.drive.frames - 1, `${index + 1}: ${words}`, chosen);
  }));
}

// The drive that plays: the chosen one, else the one that is being imagined.
function playing() {
  const g = goal();
  const all = drives();
  if (!g || !all || !all.size) return null;
  if (g.chosen != null && all.has(g.chosen)) return all.get(g.chosen);
  const unfinished = [...all.values()].find((d) => d.step < d.steps);
  return unfinished || all.get(Math.max(...all.keys()));
}

function playDrive() {
  const d = playing();
  const canvas = $("drive");
  const slider = $("frame");
  canvas.hidden = !d;
  slider.disabled = !d;
  if (!d) return;
  const n = d.drive.frames;
  slider.max = n - 1;
  if (state.playing) state.frame = (state.frame + 1) % (n + 3); // the last picture stands for a moment
  const at = Math.min(state.frame, n - 1);
  if (state.playing) slider.value = at;
  const scale = Math.max(1, Math.floor(384 / d.drive.width));
  const context = frameOf(d.image, d.drive, at, canvas, scale);
  const g = goal();
  const box = g.answer && g.answer.box && g.chosen === d.candidate ? g.answer.box : null;
  if (box && at >= n - state.hello.about.boxed_frames) {
    context.strokeStyle = "#ff2222";
    context.lineWidth = Math.max(2, scale / 4);
    context.strokeRect(box[0] * scale, box[1] * scale, (box[2] - box[0]) * scale, (box[3] - box[1]) * scale);
  }
  canvas.setAttribute("aria-label", `The imagined drive, picture ${at + 1} of ${n}`);
}

// --- map ------------------------------------------------------------------------------------------------------------
function drawMap() {
  const canvas = $("map");
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(200, canvas.clientWidth || 320);
  const height = (width * 3) / 4;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const c = canvas.getContext("2d");
  c.scale(ratio, ratio);
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(`--${name}`).trim();
  const g = goal();
  const driven = state.shown ? g.path : state.map.path;
  const here = state.shown ? null : state.map.here;
  const imagined = (g && g.imagined) || [];
  const answer = g && (g.answer || g.draft);
  const pose = answer && answer.pose;
  const all = [...driven, ...imagined];
  if (here) all.push(here);
  if (pose) all.push([pose.x, pose.y]);
  if (g && g.object) all.push(g.object);
  for (const w of (g && g.witnesses) || []) all.push(w.object);
  if (!all.length) return;
  const xs = all.map((p) => p[0]);
  const ys = all.map((p) => p[1]);
  const middle = [(Math.min(...xs) + Math.max(...xs)) / 2, (Math.min(...ys) + Math.max(...ys)) / 2];
  const span = Math.max((Math.max(...xs) - Math.min(...xs)) / width, (Math.max(...ys) - Math.min(...ys)) / height, 2 / width);
  const scale = 0.86 / span;
  const at = (p) => [width / 2 + (p[0] - middle[0]) * scale, height / 2 - (p[1] - middle[1]) * scale];

  // A grid of metres.
  c.strokeStyle = colour("line");
  c.lineWidth = 1;
  const reach = Math.ceil(width / scale / 2) + 1;
  const step = reach > 40 ? 10 : reach > 15 ? 5 : 1;
  c.beginPath();
  for (let i = -reach; i <= reach; i += 1) {
    const x = Math.round(middle[0]) + i;
    const y = Math.round(middle[1]) + i;
    if (x % step === 0) { c.moveTo(at([x, 0])[0], 0); c.lineTo(at([x, 0])[0], height); }
    if (y % step === 0) { c.moveTo(0, at([0, y])[1]); c.lineTo(width, at([0, y])[1]); }
  }
  c.stroke();
  c.fillStyle = colour("soft");
  c.font = "12px system-ui, sans-serif";
  c.fillText(`${step} m grid`, 6, height - 6);

  const line = (points, name, dash) => {
    if (points.length < 2) return;
    c.strokeStyle = colour(name);
    c.lineWidth = 2.5;
    c.setLineDash(dash);
    c.beginPath();
    points.forEach((p, i) => (i ? c.lineTo(...at(p)) : c.moveTo(...at(p))));
    c.stroke();
    c.setLineDash([]);
  };
  line(driven, "driven", []);
  line(imagined, "imagined", [6, 4]);
  const arrow = (p, yaw, name) => {
    const [x, y] = at(p);
    c.fillStyle = colour(name);
    c.save();
    c.translate(x, y);
    c.rotate(-yaw);
    c.beginPath();
    c.moveTo(11, 0); c.lineTo(-7, 6); c.lineTo(-4, 0); c.lineTo(-7, -6);
    c.fill();
    c.restore();
  };
  if (here) arrow(here, here[2], "driven");
  for (const w of (g && g.witnesses) || []) {
    const [x, y] = at(w.object);
    c.fillStyle = colour("soft");
    c.font = "bold 12px system-ui, sans-serif";
    c.fillText(w.name[0].toUpperCase(), x - 4, y + 4);
  }
  if (g && g.object) {
    const [x, y] = at(g.object);
    c.strokeStyle = colour("thing");
    c.lineWidth = 3;
    c.beginPath();
    c.moveTo(x - 6, y - 6); c.lineTo(x + 6, y + 6); c.moveTo(x + 6, y - 6); c.lineTo(x - 6, y + 6);
    c.stroke();
  }
  if (pose) {
    const cov = answer.covariance;
    if (cov) {
      // The 90 % ellipse: its axes are those of the 2 x 2 covariance of x and y.
      const [a, b, d] = [cov[0], cov[1], cov[7]];
      const mean = (a + d) / 2;
      const apart = Math.hypot((a - d) / 2, b);
      const axis = (v) => Math.sqrt(Math.max(v, 0) * 4.605) * scale;
      const [x, y] = at([pose.x, pose.y]);
      c.strokeStyle = colour("goal");
      c.lineWidth = 2;
      c.beginPath();
      c.ellipse(x, y, axis(mean + apart), axis(mean - apart), -0.5 * Math.atan2(2 * b, a - d), 0, 2 * Math.PI);
      c.stroke();
    }
    arrow([pose.x, pose.y], pose.yaw, "goal");
  }
}

// --- counts and past goals ------------------------------------------------------------------------------------------
function counts() {
  const { node, view, events_dropped } = state.status;
  const rows = [];
  if (node) {
    const frames = node.frames || {};
    const context = node.context || {};
    const age = frames.age_ms;
    rows.push(["newest picture", age == null ? "–" : `${Math.round(age)} ms old`]);
    rows.push(["pictures received", frames.received], ["pictures dropped", frames.dropped], ["pictures lost on the way", frames.missed]);
    rows.push(["messages not understood", frames.bad_messages], ["poses dropped", frames.poses_dropped], ["events dropped", frames.events_dropped]);
    rows.push(["moments remembered", context.latents], ["moments that left", context.evicted]);
    if (node.goals) rows.push(["goals", node.goals.goals], ["answers", node.goals.answers]);
    if (node.recording_dropped != null) rows.push(["recording dropped", node.recording_dropped]);
    if (node.drive) rows.push(["drive", node.drive.state]);
  }
  rows.push(["viewers of this page", view.viewers], ["pictures that viewers skipped", view.skipped], ["page events dropped", events_dropped]);
  $("counts").tBodies[0].replaceChildren(...rows.filter(([, value]) => value != null).map(([name, value]) => {
    const row = document.createElement("tr");
    for (const text of [name, String(value)]) row.append(Object.assign(document.createElement("td"), { textContent: text }));
    return row;
  }));
  $("faults").replaceChildren(...((node && node.faults) || []).map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

function past() {
  const slider = $("past");
  const n = state.history.length;
  slider.disabled = n < 2;
  slider.max = Math.max(n - 1, 0);
  if (!state.shown) slider.value = slider.max;
  else {
    const place = state.history.findIndex(([number]) => number === state.shown.number);
    if (place < 0) back(); else slider.value = place;
  }
  pastNote();
}

function pastNote() {
  const entry = state.history[Number($("past").value)];
  if (!entry) return;
  const [, words, status, at] = entry;
  const place = `${Number($("past").value) + 1} of ${state.history.length}`;
  $("pastnote").textContent = `${place}: “${words}” at ${new Date(at).toLocaleTimeString()}: ${status ? status.replaceAll("_", " ") : "in work"}`;
  $("newest").disabled = !state.shown;
}

function back() {
  state.shown = null;
  $("past").value = $("past").max;
  pastNote();
  draw();
}

async function showPast() {
  const entry = state.history[Number($("past").value)];
  if (!entry || Number($("past").value) === state.history.length - 1) { back(); return; }
  const answer = await fetch(`/goal/${entry[0]}`);
  if (!answer.ok) { $("pastnote").textContent = (await answer.text()).trim(); return; }
  const whole = await answer.json();
  const pictures = await Promise.all(whole.drives.map((d) => picture(d.drive.url)));
  state.shown = whole;
  state.shownDrives = new Map(whole.drives.map((d, i) => [d.candidate, { ...d, image: pictures[i] }]));
  state.frame = 0;
  pastNote();
  draw();
}

// --- hands ----------------------------------------------------------------------------------------------------------
const send = (request) => state.socket.readyState === WebSocket.OPEN && state.socket.send(JSON.stringify(request));
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  back();
  send({ ask: $("text").value });
});
$("cancel").addEventListener("click", () => send({ cancel: true }));
$("play").addEventListener("click", () => {
  state.playing = !state.playing;
  $("play").textContent = state.playing ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(state.playing));
});
$("frame").addEventListener("input", () => {
  if (state.playing) $("play").click();
  state.frame = Number($("frame").value);
});
$("past").addEventListener("input", pastNote);
$("past").addEventListener("change", showPast);
$("newest").addEventListener("click", back);
window.addEventListener("resize", drawMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
setInterval(() => { playDrive(); if (!state.shown && state.live && !state.live.over) times(); }, 200);
connect();
