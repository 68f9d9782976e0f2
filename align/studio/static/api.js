// Asks the server of the studio. The cookie has the token; answers are JSON, and errors have a text for the user.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch("/api/" + path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    throw new ApiError("The studio does not answer. Is `align studio` still running?", 0);
  }
  const text = await response.text();
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    value = { error: `The studio answered with status ${response.status}.` };
  }
  if (!response.ok) throw new ApiError(value.error || `status ${response.status}`, response.status);
  return value;
}

// get("runs/smoke", { page: 2 }): values that are null or undefined are skipped.
export function get(path, query, signal) {
  const pairs = Object.entries(query || {}).filter(([, value]) => value !== null && value !== undefined);
  const words = new URLSearchParams(pairs).toString();
  return ask(words ? `${path}?${words}` : path, { signal });
}

export function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body === undefined ? {} : body), signal });
}

const FIRST_PAUSE = 1000;
const LONGEST_PAUSE = 15000;

// Follows a stream of server-sent events and returns a function that ends it. `handlers` maps an event's name to a
// function of its JSON. A lost connection is opened again, after a longer pause each time. A hidden page has none,
// since a browser allows six at once. `onconnect(true or false)` tells about it.
export function stream(path, handlers, onconnect = () => {}) {
  let source = null;
  let timer = null;
  let pause = FIRST_PAUSE;
  let ended = false;

  function close() {
    clearTimeout(timer);
    if (source) source.close();
    source = null;
  }
  function open() {
    close();
    if (ended || document.hidden) return;
    source = new EventSource("/api/" + path);
    source.addEventListener("open", () => {
      pause = FIRST_PAUSE;
      onconnect(true);
    });
    source.addEventListener("error", () => {
      close();
      onconnect(false);
      timer = setTimeout(open, pause);
      pause = Math.min(2 * pause, LONGEST_PAUSE);
    });
    for (const [name, handler] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => handler(JSON.parse(event.data)));
    }
  }

  document.addEventListener("visibilitychange", open);
  open();
  return () => {
    ended = true;
    document.removeEventListener("visibilitychange", open);
    close();
  };
}

// Posts a body and reads the answer as server-sent events: handlers by event name, as of `stream`. Resolves at the end.
export async function postStream(path, body, handlers, signal) {
  let response;
  try {
    response = await fetch("/api/" + path, {
      method: "POST",
      credentials: "same-origin",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") return;
    throw new ApiError("The studio does not answer. Is `align studio` still running?", 0);
  }
  if (!response.ok) {
    const value = await response.json().catch(() => ({}));
    throw new ApiError(value.error || `status ${response.status}`, response.status);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replace(/\r\n/g, "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) readEvent(block, handlers);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
}

function readEvent(block, handlers) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (data.length && handlers[name]) handlers[name](JSON.parse(data.join("\n")));
}

const encode = encodeURIComponent;
export function path(...parts) {
  return parts.map(encode).join("/");
}
