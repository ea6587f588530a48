// An exercise: the page names a class, and the visitor shows it to the camera until it has been read for a second. Nothing is kept.

const ROUNDS = 10;
const HELD = 1000; // milliseconds for which the reading must be right

export class Exercise {
  constructor(names) {
    this.names = names;
    this.round = 1;
    this.since = null; // when the reading became right; null: it is not
    this.choose();
  }

  /** Ask for another class: each once in a random order, then all again. */
  choose() {
    if (!this.left?.length) this.left = shuffled(this.names);
    if (this.left.at(-1) === this.asked) this.left.reverse(); // not the same twice, if there are others
    this.asked = this.left.pop();
    this.since = null;
  }

  /** Take note of a reading (null: nothing is recognised); whether the class has now been shown for long enough. */
  see(label, now) {
    if (label !== this.asked) this.since = null;
    else this.since ??= now;
    return this.since !== null && now - this.since >= HELD;
  }

  /** Go on to the next class; whether there is one. */
  next() {
    this.round += 1;
    this.choose();
    return this.round <= ROUNDS;
  }

  get progress() {
    return `${this.round} of ${ROUNDS}`;
  }
}

function shuffled(names) {
  const mixed = [...names];
  for (let last = mixed.length - 1; last > 0; last -= 1) {
    const other = Math.floor(Math.random() * (last + 1));
    [mixed[last], mixed[other]] = [mixed[other], mixed[last]];
  }
  return mixed;
}
