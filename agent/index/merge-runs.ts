import { NO_DATA } from './extent.ts'
import type { MergeInput } from './merge-input.ts'
import type { RunWriter } from './run-writer.ts'

/**
 * Merges sorted streams into one run; where they overlap the newest wins and the older is split. Memory is that of the
 * inputs' buffers; one pass.
 * @param newestFirst inputs, the newest first
 */
export const mergeRuns = (newestFirst: readonly MergeInput[], writer: RunWriter): void => {
  const inputs = newestFirst
  const count = inputs.length
  // What is left of each input's current extent begins here.
  const starts = Float64Array.from(inputs, (input) => input.key)
  const ends = Float64Array.from(inputs, (input) => input.endKey)
  for (;;) {
    let position = Infinity
    let winner = -1
    for (let at = 0; at < count; at++) {
      if (starts[at] < position) {
        position = starts[at]
        winner = at
      }
    }
    if (winner === -1) return
    // Equal starts: the first found is the newest. A newer extent that begins later ends the winner's turn.
    let end = ends[winner]
    for (let at = 0; at < winner; at++) if (starts[at] < end) end = starts[at]
    const input = inputs[winner]
    const sector = input.sector === NO_DATA ? NO_DATA : input.sector + (position - input.key)
    writer.add(position, end - position, input.segment, input.frame, sector)
    for (let at = 0; at < count; at++) {
      if (starts[at] >= end) continue
      if (ends[at] > end) {
        starts[at] = end
        continue
      }
      const passed = inputs[at]
      do passed.advance()
      while (passed.endKey <= end)
      starts[at] = Math.max(passed.key, end)
      ends[at] = passed.endKey
    }
  }
}
