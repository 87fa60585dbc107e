/** One line of the bench's result. `ratio` is oriented so that larger is better for us: 1 is as good as the reference. */
export type Figure = {
  name: string
  value: number
  unit: string
  /** What `value` is held against, measured in the same run; null where there is nothing to hold it against. */
  reference: number | null
  ratio: number | null
  /** What the reference is. */
  against?: string
  /** The short form: a smaller size or a shorter history than the name says. */
  reduced?: boolean
  note?: string
}

export const median = (values: readonly number[]): number => {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

export const quantile = (values: readonly number[], share: number): number => {
  const sorted = values.toSorted((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]
}

export type Direction = 'more is better' | 'less is better'

/** Medians of both, and the median of the ratios round by round: the machine's speed drifts, pairs drift together. */
export const figureOf = (name: string, unit: string, direction: Direction, rounds: readonly { ours: number; reference: number }[], against: string): Figure => ({
  name,
  value: median(rounds.map(({ ours }) => ours)),
  unit,
  reference: median(rounds.map(({ reference }) => reference)),
  ratio: median(rounds.map(({ ours, reference }) => (direction === 'more is better' ? ours / reference : reference / ours))),
  against,
})

/** A bench: a group of figures that share a set-up. */
export type Bench = {
  /** Figures that `run` gives; a name asked for by --only selects the bench. */
  names: readonly string[]
  run: (options: BenchOptions) => Promise<Figure[]>
}

export type BenchOptions = {
  /** Short rounds, reduced sizes. */
  quick: boolean
  wants: (name: string) => boolean
  say: (line: string) => void
  /** For sockets and small files: a short path. */
  scratchDirectory: string
  /** On a real disk, for what is made durable. */
  diskDirectory: string
  /** Aborted when the run is given up. */
  signal: AbortSignal
}
