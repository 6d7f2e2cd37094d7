// The server's OpenAI-compatible API: streaming requests, and what can go wrong with them in words.

export class ServerError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

const AWAY = "The server cannot be reached. Is gpt serve still running? Nothing is lost.";

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (options?.signal?.aborted) throw error;
    throw new ServerError(AWAY, "away");
  }
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({}));
  if (response.status === 401) return new ServerError("The server does not accept this key.", "key");
  const wait = response.status === 429 && response.headers.get("Retry-After");
  const message = wait ? `The server is busy; try again in ${wait} s.` : error?.message;
  return new ServerError(message ?? `The server answers with status ${response.status}.`, error?.code);
}

/** {model, chat, context, key_required} */
export async function pageInfo() {
  const response = await reach("page.json");
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** Yields the API's chunks as they come. Throws ServerError: refused, away, or cut before the end. */
async function* stream(path, body, key, signal) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  body = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const response = await reach(path, { method: "POST", headers, body, signal });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const cut = new ServerError("The connection broke before the end; what came is kept.", "cut");
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw signal.aborted ? error : cut;
    });
    if (done) throw cut;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, chunk.error.code);
      yield chunk;
    }
  }
}

/** The stream of the first attempt, [request, note], whose prompt fits: only the server counts tokens. */
export async function* fitting(path, common, attempts, key, signal) {
  let refusal;
  for (const [request, note] of attempts) {
    try {
      for await (const chunk of stream(path, { ...common, ...request }, key, signal)) yield { chunk, note, request };
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded") throw error;
      refusal = error;
    }
  }
  throw refusal;
}
