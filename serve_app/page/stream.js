// Server-sent events of a streamed answer.
import { ApiError } from "./api.js";

/** The JSON of each event until `[DONE]`. Throws an ApiError for an `error` event and for an end without `[DONE]`. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("The connection ended before the answer did.");
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep connections open
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message ?? "The answer ended with an error.");
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The connection was lost.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
