/** A checkpoint of a group as retention sees it: its place in each journal. The label is for people. */
export type Candidate = { id: string; atUnixMs: number; seqs: Record<string, number> }

/**
 * How old history is, by a clock that nobody can set. `livedMs` counts monotonic time during which checkpoints came; a sample says which
 * checkpoint was the newest when. Labels, the agent's wall clock and the source's may jump in any direction: nothing here reads them.
 * What is not counted (the agent was down, the file was lost, the source was silent) makes history longer, never shorter.
 */
export type HistoryClock = { livedMs: number; samples: readonly (Candidate & { livedMs: number })[] }

export const newHistoryClock = (): HistoryClock => ({ livedMs: 0, samples: [] })

/** Checkpoints are at most an hour apart: a longer silence is one, and does not age what was there before. */
export const LONGEST_GAP_MS = 3_600_000
const SAMPLES_A_HISTORY = 240

/** How far apart samples are, and how far the base moves at once. */
export const sampleEveryMs = (historyMs: number): number => Math.max(1000, Math.floor(historyMs / SAMPLES_A_HISTORY))

/** A new checkpoint was seen, `sinceMs` of monotonic time after the one before. */
export const lived = (clock: HistoryClock, sinceMs: number, newest: Candidate, everyMs: number): HistoryClock => {
  const livedMs = clock.livedMs + Math.max(0, Math.min(sinceMs, LONGEST_GAP_MS))
  const last = clock.samples.at(-1)
  if (last !== undefined && livedMs < last.livedMs + everyMs) return { ...clock, livedMs }
  return { livedMs, samples: [...clock.samples, { ...newest, livedMs }] }
}

/** `a` is at or before `b` in every journal that both have, and they have one in common. */
export const isAtOrBefore = (a: Candidate, b: Candidate): boolean => {
  const common = Object.keys(a.seqs).filter((vm) => vm in b.seqs)
  return common.length > 0 && common.every((vm) => a.seqs[vm] <= b.seqs[vm])
}

/** The newest sample that is at least so old: all up to it is. */
export const agedOut = ({ livedMs, samples }: HistoryClock, ageMs: number): Candidate | undefined => samples.findLast((sample) => sample.livedMs <= livedMs - ageMs)

/** Without the samples that lie before the oldest recoverable checkpoint, but for the last of them, which says how old that one is at most. */
export const movedTo = (clock: HistoryClock, oldest: Candidate): HistoryClock => {
  const firstKept = clock.samples.findLastIndex((sample) => isAtOrBefore(sample, oldest))
  return firstKept <= 0 ? clock : { ...clock, samples: clock.samples.slice(firstKept) }
}

/** How long the history is. */
export const spanMs = ({ livedMs, samples }: HistoryClock): number => livedMs - (samples.at(0)?.livedMs ?? livedMs)
