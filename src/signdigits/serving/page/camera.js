// The camera and its pictures, for this page and that of `record`.

/** What went wrong, in words for the visitor. */
export class Trouble extends Error {
  constructor(words, { again = false, asksForToken = false } = {}) {
    super(words);
    this.again = again; // whether the same photograph may pass another time
    this.asksForToken = asksForToken;
  }
}

export function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** The camera's stream, the one away from the visitor where there are two. Throws Trouble, in these words. */
export async function getCamera(words) {
  if (!navigator.mediaDevices) {
    throw new Trouble(words.InsecureContext);
  }
  try {
    return await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    throw new Trouble(words[error.name] ?? `The camera cannot be opened (${error.message}).`);
  }
}

/** Show the camera's stream. */
export function showStream(video, stream) {
  video.srcObject = stream;
  // As in a mirror, unless the camera looks away from the visitor. What is captured is what the camera sees.
  video.classList.toggle("mirrored", stream.getVideoTracks()[0].getSettings().facingMode !== "environment");
}

/** Whether the camera's first picture has come: its size is known before. */
export function canSee(video) {
  return video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA;
}

/** The square of the camera's picture that the frame shows, as a JPEG no longer than `longest`. */
export function capture(video, longest) {
  const { videoWidth, videoHeight } = video;
  const side = Math.min(videoWidth, videoHeight);
  return draw(video, { left: (videoWidth - side) / 2, top: (videoHeight - side) / 2, width: side, height: side }, longest);
}

/** A part of a picture as a JPEG, no longer than `longest`. */
export function draw(picture, { left, top, width, height }, longest) {
  const scale = Math.min(1, longest / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // behind what is transparent, as the model has it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, left, top, width, height, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
}

export function stop(opened) {
  for (const track of opened.getTracks()) track.stop();
}
