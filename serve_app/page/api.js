// Calls of the service. Paths are relative, so that the page works below any prefix.
import { settings } from "./settings.js";

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The response to GET `path`, or to POST if there is a `body`. Throws an ApiError with words for people. */
export async function call(path, body, signal) {
  const headers = new Headers();
  if (settings.key) headers.set("authorization", `Bearer ${settings.key}`);
  if (body) headers.set("content-type", "application/json");
  const options = { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body), cache: "no-store" };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The service cannot be reached.");
  }
  if (!response.ok) throw new ApiError(await words(response, path), response.status);
  return response;
}

async function words(response, path) {
  if (response.status === 401) return "This service asks for an API key. Enter it in the settings.";
  if (response.status === 404 && path.startsWith("v1/cluster")) return `This service has no /${path}.`;
  const text = await response.text().catch(() => "");
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The service answered ${response.status} ${response.statusText}`.trim() + ".";
  }
}
