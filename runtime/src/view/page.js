"use strict";
// One page, no libraries. Everything that comes from outside is shown as text (textContent), never as HTML.
// The same page is a report when the document holds one: what a viewer would have been sent, and a recording.

const $ = (id) => document.getElementById(id);
const state = {
  hello: null, map: { path: [], here: null }, memory: null, status: null, history: [],
  live: null, drives: new Map(), // the newest goal, and its candidates' drives
  shown: null, shownDrives: null, // a past goal, when one is looked at
  came: 0, frame: 0, playing: true, socket: null, retry: 500,
  report: null, video: null, videoAt: 0, videoTime: 0, videoPlaying: false, moments: null,
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

// A file that somebody sent: nothing is connected, everything is there.
function openReport(report) {
  state.report = report;
  for (const e of document.querySelectorAll(".report")) e.hidden = false;
  for (const e of document.querySelectorAll(".live")) e.hidden = true;
  $("pastgoals").hidden = Object.keys(report.goals).length === 0;
  document.title = "mindseye: report";
  $("link").textContent = `a report, made ${new Date(report.made_ms).toLocaleString()}; it loads nothing from elsewhere`;
  $("command").textContent = report.command;
  $("facts").replaceChildren(...report.facts.map(([title, rows]) => {
    const details = document.createElement("details");
    const table = document.createElement("table");
    details.append(Object.assign(document.createElement("summary"), { textContent: title }), table);
    table.append(rowsOf(rows));
    return details;
  }));
  state.video = report.video;
  const n = state.video.frames.length;
  $("videoat").max = Math.max(n - 1, 0);
  $("videoat").disabled = $("videoplay").disabled = n < 2;
  showVideo(0);
  report.messages.forEach(hear);
}

function showVideo(at) {
  const { frames, asked_s } = state.video;
  state.videoAt = at;
  $("videoat").value = at;
  if (!frames.length) { $("videonote").textContent = "The recording holds no picture that could be read."; return; }
  const [seconds, , url] = frames[at];
  $("video").src = url;
  const asked = asked_s == null ? "" : `; asked at ${fixed(asked_s, 1)} s`;
  $("videonote").textContent = `${fixed(seconds, 1)} of ${fixed(frames.at(-1)[0], 1)} s${asked}`;
  drawMap();
}

function playVideo(passed_s) {
  if (!state.videoPlaying) return;
  const { frames } = state.video;
  state.videoTime += passed_s;
  let at = state.videoAt;
  while (at + 1 < frames.length && frames[at + 1][0] <= state.videoTime) at += 1;
  if (at !== state.videoAt) showVideo(at);
  if (at + 1 === frames.length) $("videoplay").click();
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
  $("evidence").replaceChildren(...((g && g.evidence) || []).map((text) => Object.assign(document.createElement("li"), { textContent: text })));
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
  const explained = (g && g.explained) || [];
  $("explained").hidden = $("explainedhead").hidden = !explained.length;
  $("explained").replaceChildren(...explained.map(([frame, value]) => {
    const column = document.createElement("i");
    column.style.height = `${100 * value}%`;
    column.title = `picture ${frame + 1}: ${Math.round(100 * value)} %`;
    return column;
  }));
  const worst = explained.reduce((a, b) => (a && a[1] <= b[1] ? a : b), null);
  $("explainednote").textContent = worst ? `Least: picture ${worst[0] + 1}, ${Math.round(100 * worst[1])} %.` : "";
  $("explained").setAttribute("aria-label", explained.map(([f, v]) => `picture ${f + 1}: ${Math.round(100 * v)} %`).join(", "));
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
  state.moments = { image, strip: m.pictures, moments: m.moments };
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
    const chosen = g.witness === index;
    const settled = g.over || g.chosen != null;
    const words = chosen ? "chosen" : g.chosen === index ? "the chosen way, held to what was seen"
      : settled ? "rejected" : d.steps ? `step ${d.step} of ${d.steps}` : "";
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
  if (!d) { $("drivenow").textContent = ""; $("seen").hidden = true; return; }
  const n = d.drive.frames;
  slider.max = n - 1;
  if (state.playing) state.frame = (state.frame + 1) % (n + 3); // the last picture stands for a moment
  const at = Math.min(state.frame, n - 1);
  if (state.playing) slider.value = at;
  const scale = Math.max(1, Math.floor(384 / d.drive.width));
  const context = frameOf(d.image, d.drive, at, canvas, scale);
  const g = goal();
  const box = g.answer && g.answer.box && g.chosen === d.candidate ? g.answer.box : null;
  // Long drives leave out frames: which one of all this is.
  const of = d.drive.total || n;
  const index = of - 1 - (n - 1 - at) * (d.drive.every || 1);
  if (box && index >= of - state.hello.about.boxed_frames) {
    context.strokeStyle = "#ff2222";
    const each = canvas.width / (state.hello.about.width || d.drive.width);
    context.lineWidth = Math.max(2, each / 4);
    context.strokeRect(box[0] * each, box[1] * each, (box[2] - box[0]) * each, (box[3] - box[1]) * each);
  }
  canvas.setAttribute("aria-label", `The imagined drive, picture ${index + 1} of ${of}`);
  $("drivenow").textContent = `imagined: picture ${index + 1} of ${of}`;
  ((g && g.explained) || []).forEach(([frame], i) => {
    const column = $("explained").children[i];
    if (column) column.classList.toggle("now", index <= frame && (i === 0 || index > g.explained[i - 1][0]));
  });
  showSeen(g.chosen === d.candidate ? poseOf(g, index) : null);
}

// Where the base stands in a picture of the imagined drive: the path has a pose for the last of every four.
function poseOf(g, index) {
  const path = g.imagined || [];
  if (path.length < 2) return null;
  const along = Math.min(Math.max((index + 1) / 4 - 1, 0), path.length - 1);
  const before = Math.min(Math.floor(along), path.length - 2);
  const [a, b, t] = [path[before], path[before + 1], along - before];
  return [a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * turned(b[2] - a[2])];
}

const turned = (angle) => Math.atan2(Math.sin(angle), Math.cos(angle));

// The picture that was really taken nearest to a pose: of the recording, or of the memory.
function showSeen(pose) {
  const all = state.video ? state.video.frames.map((f) => f[1]) : state.moments ? state.moments.moments.map((m) => m[3]) : [];
  let best = null;
  all.forEach((p, i) => {
    if (!pose || !p) return;
    const [away, turn] = [Math.hypot(p[0] - pose[0], p[1] - pose[1]), Math.abs(turned(p[2] - pose[2]))];
    if (away < 0.4 && turn < 0.35 && (!best || away + turn < best.cost)) best = { i, away, turn, cost: away + turn };
  });
  $("seen").hidden = !pose || !all.length;
  const canvas = $("seenpicture");
  canvas.hidden = !best;
  if (!best) { $("seennote").textContent = "never seen from there"; return; }
  $("seennote").textContent = `seen: ${fixed(best.away)} m and ${Math.round((best.turn * 180) / Math.PI)}° away`;
  if (!state.video) { frameOf(state.moments.image, state.moments.strip, best.i, canvas, 8); return; }
  picture(state.video.frames[best.i][2]).then((image) => {
    if (image) frameOf(image, { width: image.naturalWidth, height: image.naturalHeight }, 0, canvas, 1);
  });
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
  const filmed = state.video && state.video.frames[state.videoAt];
  const here = filmed ? filmed[1] : state.shown ? null : state.map.here;
  const imagined = (g && g.imagined) || [];
  const answer = g && (g.answer || g.draft);
  const pose = answer && answer.pose;
  const all = [...driven, ...imagined];
  if (here) all.push(here);
  if (pose) all.push([pose.x, pose.y]);
  if (g && g.object) all.push(g.object);
  for (const w of (g && g.witnesses) || []) all.push(w.object);
  const things = (g && g.things) || [];
  for (const [, x, y] of things) all.push([x, y]);
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
  c.fillStyle = colour("soft");
  for (const [px, py] of ((g && g.landmarks) || []).map(at)) c.fillRect(px - 1, py - 1, 2, 2);
  for (const [name, tx, ty] of things) {
    const [px, py] = at([tx, ty]);
    c.beginPath();
    c.arc(px, py, 4, 0, 2 * Math.PI);
    c.fill();
    c.fillText(name, px + 7, py + 4);
  }
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
  if (!state.report) rows.push(["viewers of this page", view.viewers], ["pictures that viewers skipped", view.skipped], ["page events dropped", events_dropped]);
  $("counts").replaceChildren(rowsOf(rows.filter(([, value]) => value != null)));
  $("faults").replaceChildren(...((node && node.faults) || []).map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

function rowsOf(rows) {
  const body = document.createElement("tbody");
  body.append(...rows.map((cells) => {
    const row = document.createElement("tr");
    for (const text of cells) row.append(Object.assign(document.createElement("td"), { textContent: String(text) }));
    return row;
  }));
  return body;
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
  let whole = state.report && state.report.goals[entry[0]];
  if (!state.report) {
    const answer = await fetch(`/goal/${entry[0]}`);
    if (!answer.ok) { $("pastnote").textContent = (await answer.text()).trim(); return; }
    whole = await answer.json();
  }
  if (!whole) { $("pastnote").textContent = "This goal did not fit into the report."; return; }
  const pictures = await Promise.all(whole.drives.map((d) => picture(d.drive.url)));
  state.shown = whole;
  state.shownDrives = new Map(whole.drives.map((d, i) => [d.candidate, { ...d, image: pictures[i] }]));
  state.frame = 0;
  pastNote();
  draw();
}

// --- hands ----------------------------------------------------------------------------------------------------------
const send = (request) => state.socket && state.socket.readyState === WebSocket.OPEN && state.socket.send(JSON.stringify(request));
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
$("videoplay").addEventListener("click", () => {
  state.videoPlaying = !state.videoPlaying;
  if (state.videoPlaying && state.videoAt + 1 === state.video.frames.length) showVideo(0);
  if (state.videoPlaying) state.videoTime = state.video.frames[state.videoAt][0];
  $("videoplay").textContent = state.videoPlaying ? "Pause" : "Play";
  $("videoplay").setAttribute("aria-pressed", String(state.videoPlaying));
});
$("videoat").addEventListener("input", () => {
  if (state.videoPlaying) $("videoplay").click();
  showVideo(Number($("videoat").value));
});
window.addEventListener("resize", drawMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
setInterval(() => { playDrive(); if (!state.shown && state.live && !state.live.over) times(); }, 200);
if ($("report")) {
  setInterval(() => playVideo(0.05), 50);
  openReport(JSON.parse($("report").textContent));
} else connect();
