// The page of a host: built once, then only changed where a snapshot differs. Names and errors are other people's text:
// they reach the document as text nodes alone.

const SVG = "http://www.w3.org/2000/svg";
const SECONDS = 60;
const AGES_MS = 5000;

const HEALTH = {
  ok: ["✓", "All well", "bd-good"],
  busy: ["◔", "Busy", "bd-warn"],
  degraded: ["▲", "Degraded", "bd-warn"],
  down: ["✗", "Down", "bd-bad"],
  closed: ["■", "Closed", "bd-quiet"],
};
const STATES = {
  ready: ["●", "bd-good"],
  starting: ["◌", "bd-quiet"],
  spare: ["○", "bd-quiet"],
  draining: ["◐", "bd-warn"],
  unresponsive: ["▲", "bd-warn"],
  dead: ["✗", "bd-bad"],
};

// -- how things are written ----------------------------------------------------

const whole = new Intl.NumberFormat("en");

/** A duration in ns as people read it: `412 ms`. */
function duration(ns) {
  if (ns === null) return "–";
  if (ns < 1e6) return `${(ns / 1e3).toFixed(0)} µs`;
  if (ns < 1e8) return `${(ns / 1e6).toFixed(1)} ms`;
  if (ns < 1e9) return `${(ns / 1e6).toFixed(0)} ms`;
  if (ns < 1.2e11) return `${(ns / 1e9).toFixed(2)} s`;
  return `${(ns / 6e10).toFixed(1)} min`;
}

function age(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds / 5) * 5)} s`;
  if (seconds < 5400) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

const rate = (perSecond) => (perSecond >= 100 ? whole.format(Math.round(perSecond)) : perSecond.toFixed(1));
const memory = (bytes) => (bytes ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : "–");
const share = (of) => (of === null ? "–" : `${(of * 100).toFixed(of > 0 && of < 0.1 ? 1 : 0)} %`);
const clock = (at) => new Date(at * 1000).toLocaleTimeString("en-GB");

// -- what the page is made of --------------------------------------------------

function made(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

/** A node whose only child is a text, written when it differs. */
class Words {
  constructor(node) {
    this.node = node;
    this.text = document.createTextNode("");
    node.append(this.text);
    this.shown = "";
    this.className = node.className;
  }
  set(text, className = null) {
    if (text !== this.shown) this.text.data = this.shown = text;
    if (className !== null && className !== this.className) this.node.className = this.className = className;
  }
}

class Tile {
  constructor(list, label, { series = false, errors = false } = {}) {
    const tile = made("div", `bd-tile${series ? " bd-series" : ""}${errors ? " bd-errors" : ""}`);
    tile.append(made("dt", "", label));
    this.figure = new Words(made("dd", "bd-figure"));
    this.note = new Words(made("dd", "bd-note"));
    tile.append(this.figure.node, this.note.node);
    if (series) {
      const chart = document.createElementNS(SVG, "svg");
      chart.setAttribute("viewBox", `0 0 ${SECONDS - 1} 20`);
      chart.setAttribute("preserveAspectRatio", "none");
      chart.setAttribute("aria-hidden", "true"); // the note beneath the figure says it in words
      this.curve = document.createElementNS(SVG, "polyline");
      chart.append(this.curve);
      tile.append(chart);
      this.points = "";
    }
    list.append(tile);
    this.node = tile;
  }
  set(figure, note = "") {
    this.figure.set(figure);
    this.note.set(note);
  }
  draw(series) {
    const most = Math.max(1, ...series);
    const points = series.map((value, x) => `${x},${(19 - (value / most) * 18).toFixed(1)}`).join(" ");
    if (points !== this.points) this.curve.setAttribute("points", (this.points = points));
  }
}

/** A table whose rows stay: a row is made when there is one more than ever before, and hidden when there is one less. */
class Table {
  constructor(parent, title, columns, empty) {
    this.section = made("section");
    this.title = new Words(made("h3"));
    this.title.set(title);
    this.columns = columns;
    this.empty = new Words(made("p", "bd-empty"));
    this.empty.set(empty);
    this.scroll = made("div", "bd-scroll");
    this.scroll.tabIndex = 0;
    this.scroll.setAttribute("role", "region");
    this.scroll.setAttribute("aria-label", title);
    const table = made("table");
    const head = made("tr");
    for (const [name, kind] of columns) {
      const cell = made("th", kind, name);
      cell.scope = "col";
      head.append(cell);
    }
    const top = made("thead");
    top.append(head);
    this.body = made("tbody");
    table.append(top, this.body);
    this.scroll.append(table);
    this.section.append(this.title.node, this.empty.node, this.scroll);
    parent.append(this.section);
    this.rows = [];
    this.filled = -1;
  }
  row(index) {
    while (this.rows.length <= index) {
      const node = made("tr");
      const cells = this.columns.map(([, kind], column) => {
        const cell = made(column === 0 ? "th" : "td", kind);
        if (column === 0) cell.scope = "row";
        node.append(cell);
        return new Words(cell);
      });
      this.body.append(node);
      this.rows.push({ node, cells });
    }
    return this.rows[index].cells;
  }
  set(items, fill) {
    items.forEach((item, index) => fill(this.row(index), item));
    if (items.length === this.filled) return;
    this.filled = items.length;
    this.rows.forEach(({ node }, index) => (node.hidden = index >= items.length));
    this.scroll.hidden = !items.length;
    this.empty.node.hidden = items.length > 0;
  }
}

class Page {
  constructor(root) {
    const header = made("header");
    header.append(made("h2", "", "Bridge host"));
    const status = made("p");
    status.setAttribute("role", "status");
    status.setAttribute("aria-live", "polite");
    this.mark = new Words(made("span", "bd-state"));
    this.mark.node.setAttribute("aria-hidden", "true");
    this.state = new Words(made("span", "bd-state"));
    this.summary = new Words(made("span"));
    status.append(this.mark.node, " ", this.state.node, " ", this.summary.node);
    this.where = new Words(made("p", "bd-where"));
    header.append(status, this.where.node);

    const tiles = made("dl", "bd-tiles");
    this.kernels = new Tile(tiles, "Kernels");
    this.queue = new Tile(tiles, "Waiting");
    this.commands = new Tile(tiles, "Commands/s", { series: true });
    this.errors = new Tile(tiles, "Errors/s", { series: true, errors: true });
    this.p50 = new Tile(tiles, "p50");
    this.p95 = new Tile(tiles, "p95");
    this.p99 = new Tile(tiles, "p99");
    this.models = new Tile(tiles, "Tokens");
    this.cache = new Tile(tiles, "Cache hits");

    const tables = made("div", "bd-tables");
    const [left, right] = [made("div"), made("div")];
    tables.append(left, right);
    const number = "bd-number";
    this.kernelTable = new Table(
      left,
      "Kernels",
      [["Kernel"], ["State"], ["Running", number], ["Done", number], ["Failed", number], ["Memory", number], ["Age", number], ["Process", number]],
      "No kernels.",
    );
    this.circuitTable = new Table(
      left,
      "Held back",
      [["Command", "bd-text"], ["Kernel"], ["Failures", number], ["Until"]],
      "Nothing.",
    );
    this.errorTable = new Table(
      left,
      "Last errors",
      [["Time"], ["Command", "bd-text"], ["Error", "bd-text"]],
      "No errors.",
    );
    this.commandTable = new Table(
      right,
      "Most called commands",
      [["Command", "bd-text"], ["Calls", number], ["Errors", number], ["p50", number], ["p95", number], ["p99", number]],
      "No command has ended yet.",
    );
    root.append(header, tiles, tables);
    this.root = root;
    this.snapshot = null;
    this.ahead = 0; // of the host's clock, in seconds: it may be another machine's
  }

  show(snapshot) {
    if (!snapshot || snapshot.kind !== "snapshot") return;
    if (this.snapshot === null || this.snapshot.pid !== snapshot.pid) this.ahead = Date.now() / 1000 - snapshot.at;
    const s = (this.snapshot = snapshot);
    const [mark, word, className] = HEALTH[s.health] ?? ["?", s.health, "bd-quiet"];
    this.mark.set(mark, `bd-state ${className}`);
    this.state.set(word, `bd-state ${className}`);
    this.summary.set(s.summary);
    this.kernels.set(`${s.ready}/${Math.max(s.wanted, s.ready)}`, `${whole.format(s.in_flight)} running`);
    this.queue.set(whole.format(s.waiting), s.rejected ? `${whole.format(s.rejected)} refused` : "none refused");
    this.commands.set(rate(s.commands_per_s), `${whole.format(sum(s.command_series))} in 1 min`);
    this.commands.draw(s.command_series);
    this.errors.set(rate(s.errors_per_s), `${whole.format(sum(s.error_series))} in 1 min`);
    this.errors.draw(s.error_series);
    this.p50.set(duration(s.p50), "half are faster");
    this.p95.set(duration(s.p95), "19 of 20 are");
    this.p99.set(duration(s.p99), "99 of 100 are");
    this.models.node.hidden = !s.tokens;
    this.models.set(whole.format(s.tokens), s.cost ? `$${s.cost.toFixed(s.cost < 1 ? 4 : 2)}` : "no cost known");
    this.cache.node.hidden = !s.cache_hits;
    this.cache.set(whole.format(s.cache_hits), "not run again");
    const more = s.kernels_in_all - s.kernels.length;
    this.kernelTable.title.set(more > 0 ? `Kernels (the first ${s.kernels.length} of ${s.kernels_in_all})` : "Kernels");
    this.kernelTable.set(s.kernels, (cells, k) => {
      const [symbol, stateClass] = STATES[k.state] ?? ["?", "bd-quiet"];
      cells[0].set(k.id || "–");
      cells[1].set(`${symbol} ${k.state}`, stateClass);
      cells[2].set(whole.format(k.in_flight));
      cells[3].set(whole.format(k.completed));
      cells[4].set(share(k.error_rate), k.error_rate ? "bd-number bd-bad" : "bd-number");
      cells[5].set(memory(k.rss));
      cells[7].set(k.pid ? String(k.pid) : "–");
    });
    this.commandTable.set(s.commands, (cells, c) => {
      cells[0].set(c.subject);
      cells[1].set(whole.format(c.count));
      cells[2].set(whole.format(c.errors), c.errors ? "bd-number bd-bad" : "bd-number");
      cells[3].set(duration(c.p50));
      cells[4].set(duration(c.p95));
      cells[5].set(duration(c.p99));
    });
    this.errorTable.set(s.errors, (cells, e) => {
      cells[0].set(clock(e.at));
      cells[1].set(e.subject);
      cells[2].set(e.type);
    });
    this.circuitTable.section.hidden = !s.circuits.length;
    this.circuitTable.set(s.circuits, (cells, c) => {
      cells[0].set(c.subject);
      cells[1].set(c.kernel || "all");
      cells[2].set(whole.format(c.failures));
      cells[3].set(clock(c.until));
    });
    this.grow();
  }

  /** Ages go on while nothing else changes. */
  grow() {
    const s = this.snapshot;
    if (s === null) return;
    const now = s.health === "closed" ? s.at : Date.now() / 1000 - this.ahead;
    this.where.set(`process ${s.pid}, ${s.health === "closed" ? "was " : ""}open for ${age(now - s.started)}`);
    s.kernels.forEach((k, index) => this.kernelTable.row(index)[6].set(age(now - k.born)));
  }
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

// -- as anywidget has it -------------------------------------------------------

function render({ model, el }) {
  const root = made("section", "bridge-dashboard");
  root.setAttribute("aria-label", "Bridge host");
  el.append(root);
  const page = new Page(root);
  const update = () => page.show(model.get("snapshot"));
  // Only a page that nobody can see at all says so. One that is scrolled out of view does not: to come back it would
  // need the notebook's kernel, which may be busy, and running commands is when one wants to look.
  const tell = (watched) => {
    if (model.get("watched") === watched) return;
    model.set("watched", watched);
    model.save_changes();
  };
  const seen = () => tell(!document.hidden);
  const contradict = () => {
    if (!document.hidden) tell(true); // another view of the same page was hidden
  };
  const timer = setInterval(() => document.hidden || page.grow(), AGES_MS);
  model.on("change:snapshot", update);
  model.on("change:watched", contradict);
  document.addEventListener("visibilitychange", seen);
  update();
  seen();
  return () => {
    clearInterval(timer);
    model.off("change:snapshot", update);
    model.off("change:watched", contradict);
    document.removeEventListener("visibilitychange", seen);
    tell(false); // if there is another view, it contradicts
  };
}

export default { render };
