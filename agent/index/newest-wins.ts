import { ExtentList, NO_DATA } from './extent.ts'

/** Records in sequence order, the oldest first. */
export type RecordColumns = {
  readonly segment: number
  readonly keys: Float64Array
  readonly lengths: Uint32Array
  readonly frames: Uint32Array
  readonly sectors: Uint16Array
}

/** Positions 0 ... count - 1 ordered by key; equal keys stay in order. Radix sort, digits that do not differ are skipped. */
const orderByKey = (keys: Float64Array, count: number): Uint32Array => {
  let order = new Uint32Array(count)
  let other = new Uint32Array(count)
  const low = new Uint32Array(count)
  const high = new Uint32Array(count)
  let sorted = true
  for (let at = 0; at < count; at++) {
    order[at] = at
    low[at] = keys[at] % 0x1_0000_0000
    high[at] = Math.floor(keys[at] / 0x1_0000_0000)
    if (at > 0 && keys[at] < keys[at - 1]) sorted = false
  }
  if (sorted) return order
  const starts = new Uint32Array(256)
  for (let digit = 0; digit < 7; digit++) {
    const words = digit < 4 ? low : high
    const shift = (digit & 3) * 8
    starts.fill(0)
    for (let at = 0; at < count; at++) starts[(words[at] >>> shift) & 255]++
    if (starts[(words[0] >>> shift) & 255] === count) continue
    let sum = 0
    for (let bucket = 0; bucket < 256; bucket++) {
      const inBucket = starts[bucket]
      starts[bucket] = sum
      sum += inBucket
    }
    for (let at = 0; at < count; at++) {
      const record = order[at]
      other[starts[(words[record] >>> shift) & 255]++] = record
    }
    const swap = order
    order = other
    other = swap
  }
  return order
}

/**
 * The newest record of every range among the first `count` records: sorted extents that do not overlap.
 * A sweep over the starts with a heap of the records under way, the newest on top.
 */
export const newestWins = (records: RecordColumns, count: number): ExtentList => {
  const { keys, lengths, frames, sectors } = records
  const result = new ExtentList(records.segment, count)
  const order = orderByKey(keys, count)
  let heap = new Uint32Array(256)
  let size = 0
  let position = 0

  const pop = (): void => {
    const last = heap[--size]
    let hole = 0
    for (let child = 1; child < size; child = hole * 2 + 1) {
      if (child + 1 < size && heap[child + 1] > heap[child]) child++
      if (heap[child] <= last) break
      heap[hole] = heap[child]
      hole = child
    }
    heap[hole] = last
  }
  const push = (record: number): void => {
    if (size === heap.length) {
      const grown = new Uint32Array(size * 2)
      grown.set(heap)
      heap = grown
    }
    let hole = size++
    while (hole > 0) {
      const parent = (hole - 1) >> 1
      if (heap[parent] >= record) break
      heap[hole] = heap[parent]
      hole = parent
    }
    heap[hole] = record
  }
  const advance = (until: number): void => {
    while (size > 0 && position < until) {
      const top = heap[0]
      const endOfTop = keys[top] + lengths[top]
      if (endOfTop <= position) {
        pop()
        continue
      }
      const end = endOfTop < until ? endOfTop : until
      const sector = sectors[top]
      result.push(position, end - position, frames[top], sector === NO_DATA ? NO_DATA : sector + (position - keys[top]))
      position = end
    }
  }

  for (let at = 0; at < count; at++) {
    const record = order[at]
    const start = keys[record]
    advance(start)
    position = start
    // An older record that the newest one covers to its end never shows.
    if (size > 0 && heap[0] > record && keys[heap[0]] + lengths[heap[0]] >= start + lengths[record]) continue
    push(record)
  }
  advance(Infinity)
  return result
}
