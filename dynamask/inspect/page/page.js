"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const { tokens, layers, heads, prompt } = data;
  const N = tokens.length, L = layers.length, ROWS = L * heads;

  async function unpack(text, Type) {
    if (!text) return null;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Type(await new Response(stream).arrayBuffer());
  }
  // lifetime[row * N + j]: queries, from j on, that see key j; rank: 0 (lowest of its head) to 255, by order.
  const lifetime = await unpack(data.lifetimes, data.wide ? Uint32Array : Uint16Array);
  const rank = await unpack(data.ranks, Uint8Array);
  const look = data.attention;
  const mean = look && await unpack(look.mean, Uint8Array);
  const topKeys = look && await unpack(look.keys, data.wide ? Uint32Array : Uint16Array);
  const topWeights = look && await unpack(look.weights, Uint8Array);
  const T = look ? look.queries : 0, K = look ? look.top : 0;
  const ranks = layers.some((layer) => layer.kind === "ranked");
  const firstTokens = Math.max(...layers.map((layer) => layer.sinks), 1);
  const weightOf = (byte) => (byte / 255) ** 2;

  let position = N - 1, mode = "kept", row = -1, playing = null, attended = [];
  const alive = (r, j) => j <= position && j + lifetime[r * N + j] > position;
  const number = new Intl.NumberFormat("en").format;
  const shown = (text) => text === "" ? "▫" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  const nameOf = (r) => `layer ${Math.floor(r / heads)}, head ${r % heads}`;
  const windowOf = (r) => { const w = layers[Math.floor(r / heads)].windows; return w ? w[r % heads] : null; };
  const kindOf = (r) => layers[Math.floor(r / heads)].kind;

  // The text.
  const spans = tokens.map((token, j) => {
    const span = document.createElement("span");
    span.textContent = token === "" ? "" : token;
    span.dataset.j = j;
    $("text").append(span);
    return span;
  });
  const madeClass = (j) => j >= prompt ? "made " : "";

  // Windows, one column per layer.
  const widest = Math.max(...layers.flatMap((layer) => layer.windows || []));
  const narrowest = Math.min(...layers.flatMap((layer) => layer.windows || []));
  const shade = (w) => Math.round(1 + 8 * (widest > narrowest ? Math.log(w / narrowest) / Math.log(widest / narrowest) : .5));
  const cells = [];
  $("map").style.gridTemplateColumns = `auto repeat(${L}, minmax(0, 1fr))`;
  for (let g = 0; g < heads; g++) {
    const line = document.createElement("div");
    line.className = "line";
    line.setAttribute("role", "row");
    const label = document.createElement("span");
    label.className = "label";
    label.textContent = heads > 1 ? `head ${g}` : "";
    label.setAttribute("role", "rowheader");
    line.append(label);
    for (let l = 0; l < L; l++) {
      const r = l * heads + g, w = windowOf(r), cell = document.createElement("button");
      cell.type = "button";
      cell.setAttribute("role", "gridcell");
      cell.className = w === null ? "dense" : `s${shade(w)}`;
      cell.title = `${nameOf(r)}: ${describe(r)}`;
      cell.setAttribute("aria-label", cell.title);
      cell.tabIndex = r === 0 ? 0 : -1;
      cell.dataset.r = r;
      cells[r] = cell;
      line.append(cell);
    }
    $("map").append(line);
  }
  {
    const line = document.createElement("div");
    line.className = "line";
    line.setAttribute("aria-hidden", "true");
    const every = L > 16 ? 5 : 1;
    line.append(Object.assign(document.createElement("span"), { className: "label", textContent: "layer" }));
    for (let l = 0; l < L; l++) {
      const text = l % every === 0 ? String(l) : "";
      line.append(Object.assign(document.createElement("span"), { className: "label top", textContent: text }));
    }
    $("map").append(line);
  }
  function describe(r) {
    const kind = kindOf(r);
    if (kind === "dense") return "keeps every key (dense)";
    return kind === "sliding" ? `keeps the newest ${number(windowOf(r))} keys` : `window of ${number(windowOf(r))} keys`;
  }

  // Choices.
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  $("layer").append(option("-1", "all"), ...layers.map((_, l) => option(l, l)));
  $("head").append(...Array.from({ length: heads }, (_, g) => option(g, g)));
  $("position").max = N - 1;
  $("attention-mode").hidden = !look;
  $("made-card").hidden = prompt === N;
  document.querySelector("[name=mode][value=rank]").disabled = !ranks;
  const chips = [];
  for (let j = prompt; j < N; j++) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = shown(tokens[j].trim() === "" ? tokens[j].replace(/ /g, "␣") : tokens[j].replace(/^ +/, ""));
    chip.disabled = !look;
    chip.setAttribute("aria-pressed", "false");
    chip.addEventListener("click", () => { setMode("attention"); move(j - 1); showFarthest(); });
    chips.push(chip);
    $("made").append(chip);
  }
  const budget = layers.flatMap((layer) => layer.windows || []);
  $("facts").textContent = `${data.model} · ${number(N)} tokens` + (prompt < N ? `, ${N - prompt} of them generated` : "")
    + ` · ${L} layers × ${heads} key/value head${heads > 1 ? "s" : ""} · windows ${number(narrowest)} to ${number(widest)}`
    + `, mean ${number(Math.round(budget.reduce((a, b) => a + b, 0) / budget.length))}`;

  function setMode(next) {
    mode = next;
    document.querySelector(`[name=mode][value=${next}]`).checked = true;
    if (mode === "rank" && row >= 0 && kindOf(row) !== "ranked") row = -1;
  }
  function choose(r) {
    row = r;
    if (mode === "rank" && row >= 0 && kindOf(row) !== "ranked") setMode("kept");
    draw();
  }
  function move(to) {
    position = Math.min(N - 1, Math.max(0, to));
    draw();
    scrollTo(position);
  }

  // Strength of each token's colour, 0 to 1; negative: dropped.
  function strengths() {
    const out = new Float32Array(N);
    if (mode === "attention") {
      const t = position - (look ? look.first : 0);
      if (look && t >= 0 && t < T) {
        if (row < 0) for (let j = 0; j < N; j++) out[j] = weightOf(mean[t * N + j]);
        else eachTop(t, row, (j, w) => { out[j] = w; });
        let top = 0;
        for (let j = firstTokens; j < N; j++) top = Math.max(top, out[j]);
        for (let j = 0; j < N; j++) out[j] = top ? Math.min(1, Math.sqrt(out[j] / top)) : 0;
        if (row < 0) for (let j = 0; j < N; j++) if (out[j] < .12) out[j] = 0;
      }
      return out;
    }
    const rows = row < 0 ? [...Array(ROWS).keys()] : [row];
    for (let j = 0; j <= position; j++) {
      let kept = 0, value = 0, ranked = 0;
      for (const r of rows) {
        if (j + lifetime[r * N + j] > position) kept++;
        if (rank && kindOf(r) === "ranked") { value += rank[r * N + j]; ranked++; }
      }
      out[j] = mode === "rank" ? (ranked ? value / ranked / 255 : 0) : kept / rows.length;
      if (!kept) out[j] = mode === "rank" ? out[j] : -1;
    }
    return out;
  }
  function eachTop(t, r, visit) {
    for (let k = 0; k < K; k++) {
      const at = ((t * L + Math.floor(r / heads)) * heads + r % heads) * K + k;
      if (topWeights[at]) visit(topKeys[at], weightOf(topWeights[at]));
    }
  }

  const LEGEND = {
    kept: ["dropped", "kept by all heads"],
    rank: ["ranked lowest", "ranked highest"],
    attention: ["no attention", "most attention"],
  };
  function drawText() {
    const strength = strengths();
    $("text").className = `text ${mode}`;
    $("swatch").style.setProperty("--tint", `var(--${{ kept: "kept", rank: "rank", attention: "look" }[mode]})`);
    $("low").textContent = LEGEND[mode][0];
    $("high").textContent = mode === "kept" && row >= 0 ? "kept" : LEGEND[mode][1];
    for (let j = 0; j < N; j++) {
      let name = madeClass(j);
      if (j > position) name += "later";
      else if (strength[j] < 0) name += "gone";
      else {
        const level = Math.ceil(9 * strength[j]);
        if (level) name += `s${level}`;
        if (mode === "rank" && row >= 0 && !alive(row, j)) name += " gone";
      }
      if (j === position) name += " here";
      if (spans[j].className !== name) spans[j].className = name;
    }
    let note = "";
    const t = look ? position - look.first : -1;
    if (mode === "attention" && !(t >= 0 && t < T)) note = "Attention is recorded for the generated tokens. Choose one of them, or move the slider to the end.";
    else if (mode === "attention") note = `What “${shown(tokens[position + 1])}” was written from, ${row < 0 ? "on average over all heads" : "in " + nameOf(row)}.`;
    else if (mode === "rank" && row < 0) note = "Average over all heads. Choose a layer and head to see its own ranks.";
    else if (mode === "rank") note = `${nameOf(row)}: ${describe(row)}. Grey letters: dropped by now.`;
    else if (row >= 0) note = `${nameOf(row)}: ${describe(row)}, ${number(count(row))} held now.`;
    else note = "The stronger the colour, the more heads still keep the token. Pale letters at the end are not read yet.";
    $("note").textContent = note.charAt(0).toUpperCase() + note.slice(1);
  }
  function scrollTo(j) {
    const box = $("text"), top = spans[j].offsetTop - box.offsetTop;
    if (top < box.scrollTop + 20 || top > box.scrollTop + box.clientHeight - 60) box.scrollTop = top - box.clientHeight * .5;
  }
  // Of the keys attended to most, the first that is not in view with the position: attention to the newest is no news.
  function showFarthest() {
    const found = attended.find(([j]) => j < position - 64);
    scrollTo(found ? found[0] : position);
  }
  function count(r) {
    let held = 0;
    for (let j = 0; j <= position; j++) if (alive(r, j)) held++;
    return held;
  }

  function drawStatus() {
    let held = 0;
    for (let r = 0; r < ROWS; r++) held += count(r);
    const all = ROWS * (position + 1), word = shown(tokens[position]);
    $("where").innerHTML = "";
    $("where").append(`Token ${number(position + 1)} of ${number(N)} `, Object.assign(document.createElement("b"), { textContent: word }));
    $("held").textContent = `Holds ${number(held)} of ${number(all)} keys (${Math.round(100 * held / all)} %)`;
    $("position").value = position;
    $("position").setAttribute("aria-valuetext", `token ${position + 1} of ${N}, ${word}, ${Math.round(100 * held / all)} percent of the keys held`);
    $("back").disabled = position === 0;
    $("forward").disabled = position === N - 1;
  }

  function drawMap() {
    cells.forEach((cell, r) => cell.setAttribute("aria-selected", r === row));
    const focused = document.activeElement;
    if (row >= 0 && !cells.includes(focused)) cells.forEach((cell, r) => { cell.tabIndex = r === row ? 0 : -1; });
    $("map-note").textContent = row < 0 ? "All heads are shown." : `${nameOf(row)}: ${describe(row)}.`.replace(/^l/, "L");
    $("layer").value = row < 0 ? -1 : Math.floor(row / heads);
    $("head").value = row < 0 ? 0 : row % heads;
    $("head").disabled = row < 0;
    $("all").disabled = row < 0;
  }

  function drawLooked() {
    const t = look ? position - look.first : -1, there = t >= 0 && t < T;
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", there && i === position + 1 - prompt));
    const list = $("looked"), entries = [];
    list.textContent = "";
    let first = 0;
    if (there) {
      const visit = (j, w) => { if (j < firstTokens) first += w; else entries.push([j, w]); };
      if (row < 0) for (let j = 0; j <= position; j++) visit(j, weightOf(mean[t * N + j]));
      else eachTop(t, row, visit);
    }
    entries.sort((a, b) => b[1] - a[1]);
    const best = entries.slice(0, 8).filter((entry) => entry[1] > .0005);
    attended = best;
    for (const [j, w] of best) {
      const item = document.createElement("li"), words = document.createElement("span");
      words.className = "words";
      const before = tokens.slice(Math.max(0, j - 2), j).join(""), after = tokens.slice(j + 1, j + 4).join("");
      words.append(shown(before), Object.assign(document.createElement("mark"), { textContent: shown(tokens[j]) }), shown(after));
      item.title = `token ${j + 1}`;
      item.addEventListener("click", () => scrollTo(j));
      const meter = document.createElement("span"), fill = document.createElement("i");
      meter.className = "meter";
      fill.style.width = `${100 * w / best[0][1]}%`;
      meter.append(fill);
      item.append(words, meter, Object.assign(document.createElement("span"), { className: "share", textContent: `${(100 * w).toFixed(1)} %` }));
      list.append(item);
    }
    $("sink-note").textContent = !there ? "" : `The first ${firstTokens === 1 ? "token takes" : firstTokens + " tokens take"} ${(100 * first).toFixed(0)} % of the attention`
      + (row < 0 ? ", as a rest for heads that look for nothing; they are left out above." : "; they are left out above.");
  }

  // Strips.
  const canvas = $("strips"), brush = canvas.getContext("2d");
  const labels = $("strip-labels");
  function drawStrips() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const each = Math.max(1, Math.round(Math.min(9, Math.max(2, 330 / ROWS)) * ratio)), gap = each > 4 ? 1 : 0;
    const height = each * ROWS;
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
      canvas.style.height = `${height / ratio}px`;
      labels.textContent = "";
      const every = L > 40 ? 10 : L > 12 ? 5 : 1;
      for (let l = 0; l < L; l += every) {
        const label = Object.assign(document.createElement("span"), { textContent: l });
        label.style.top = `${(l + .5) * heads * each / ratio}px`;
        labels.append(label);
      }
    }
    const style = getComputedStyle(document.documentElement);
    const color = (name) => {
      const hex = style.getPropertyValue(name).trim();
      return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    };
    const [kept, pale, card, here] = ["--kept", "--pale", "--card", "--here"].map(color);
    const image = brush.createImageData(width, height), pixels = image.data;
    for (let r = 0; r < ROWS; r++) {
      const faded = row >= 0 && r !== row ? .35 : 1;
      const line = new Uint8ClampedArray(4 * width);
      for (let x = 0; x < width; x++) {
        const from = Math.floor(x * N / width), to = Math.max(from + 1, Math.floor((x + 1) * N / width));
        let held = 0, read = 0;
        for (let j = from; j < to; j++) if (j <= position) { read++; if (alive(r, j)) held++; }
        const share = read ? held / read : 0, base = read ? pale : card;
        for (let c = 0; c < 3; c++) line[4 * x + c] = base[c] + (kept[c] - base[c]) * (share ? (.25 + .75 * share) * faded : 0);
        line[4 * x + 3] = 255;
      }
      for (let y = r * each; y < (r + 1) * each - gap; y++) pixels.set(line, 4 * width * y);
    }
    brush.putImageData(image, 0, 0);
    brush.fillStyle = `rgb(${here})`;
    brush.fillRect(Math.round((position + .5) * width / N) - ratio, 0, 2 * ratio, height);
    if (row >= 0) {
      brush.strokeStyle = `rgb(${here})`;
      brush.lineWidth = ratio;
      brush.strokeRect(ratio / 2, row * each - ratio / 2, width - ratio, each + ratio);
    }
  }

  function draw() {
    drawText();
    drawStatus();
    drawMap();
    drawLooked();
    drawStrips();
  }

  // What a person does.
  $("position").addEventListener("input", (event) => move(Number(event.target.value)));
  $("back").addEventListener("click", () => move(position - 1));
  $("forward").addEventListener("click", () => move(position + 1));
  $("all").addEventListener("click", () => choose(-1));
  document.querySelectorAll("[name=mode]").forEach((radio) => radio.addEventListener("change", () => { setMode(radio.value); draw(); }));
  $("layer").addEventListener("change", (event) => {
    const l = Number(event.target.value);
    choose(l < 0 ? -1 : l * heads + Math.max(0, row) % heads);
  });
  $("head").addEventListener("change", (event) => choose(Math.floor(row / heads) * heads + Number(event.target.value)));
  $("text").addEventListener("click", (event) => {
    const j = event.target.dataset.j;
    if (j !== undefined) move(Number(j));
  });
  $("map").addEventListener("click", (event) => {
    const r = event.target.dataset.r;
    if (r !== undefined) choose(Number(r) === row ? -1 : Number(r));
  });
  $("map").addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -heads, ArrowRight: heads, ArrowUp: -1, ArrowDown: 1 };
    const from = Number(event.target.dataset.r);
    if (!(event.key in steps) || Number.isNaN(from)) return;
    event.preventDefault();
    event.stopPropagation();
    const to = from + steps[event.key];
    if (to < 0 || to >= ROWS || (Math.abs(steps[event.key]) === 1 && heads > 1 && Math.floor(to / heads) !== Math.floor(from / heads))) return;
    cells.forEach((cell, r) => { cell.tabIndex = r === to ? 0 : -1; });
    cells[to].focus();
    choose(to);
  });
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    position = Math.min(N - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * N)));
    choose(Math.min(ROWS - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * ROWS))));
  });
  function play(on) {
    $("play").setAttribute("aria-pressed", on);
    $("play").textContent = on ? "Pause" : "Play";
    clearInterval(playing);
    playing = null;
    if (!on) return;
    if (position === N - 1) position = 0;
    const step = Math.max(1, Math.round(N / 300));
    playing = setInterval(() => { move(position + step); if (position >= N - 1) play(false); }, 70);
  }
  $("play").addEventListener("click", () => play(playing === null));
  document.addEventListener("keydown", (event) => {
    const tag = event.target.tagName;
    if (event.altKey || event.ctrlKey || event.metaKey || tag === "SELECT" || (tag === "INPUT" && event.target.type === "radio")) return;
    const size = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: position - size, ArrowRight: position + size, Home: 0, End: N - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); move(to); }
    else if (event.key === "a") choose(-1);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawStrips);
  new ResizeObserver(drawStrips).observe(canvas);
  draw();
  document.documentElement.dataset.ready = "yes";
})();
