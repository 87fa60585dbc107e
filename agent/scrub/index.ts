// The scrub: reads what is kept of every VM again, slowly and on a schedule, and says what is not as it was written (docs/decisions/scrub.md).
//
// main.ts starts one ScrubKeeper; the API asks it for its state and to begin at once. It reads sealed segments through the journal's sealing
// worker and mirror extents between two steps of promotion, notes damage in each VM's damage.json, tells the catalogue which checkpoints need
// what is damaged, and asks the protected site for a sync that writes it anew.
//
// It never changes a frame or a mirror, never makes ingest or promotion wait for more than one read, and calls nothing whole that it has not read.
export { ScrubKeeper } from './scrub-keeper.ts'
export type { ScrubKeeperOptions, ScrubbedVm } from './scrub-keeper.ts'
