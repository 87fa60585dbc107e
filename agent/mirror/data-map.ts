import { execFile } from 'node:child_process'
import { stat } from 'node:fs/promises'
import { promisify } from 'node:util'
import type { NbdClient } from '../../core/nbd/index.ts'

const run = promisify(execFile)
const MAX_OUTPUT_BYTES = 64 * 1024 * 1024
const DEADLINE_MS = 20_000
const STATE_ZERO = 2
const STEP_BYTES = 1024 * 1024 * 1024
const MAX_RANGES = 1_000_000

/** Ranges of a file that hold data, as start, end, start, end ...; everything between is a hole. undefined: not known. */
export type DataMap = Float64Array | undefined

/**
 * Which parts of a sparse file are holes. Node cannot ask the kernel (SEEK_HOLE), `qemu-img map` can. Where it does not
 * answer (no such program, too fragmented, too slow) all counts as data, which is right and only slower.
 */
export const mapData = async (path: string, signal?: AbortSignal): Promise<DataMap> => {
  const { blocks, size } = await stat(path)
  if (blocks === 0) return new Float64Array(0)
  if (blocks * 512 >= size) return Float64Array.of(0, size)
  const image = `driver=raw,file.driver=file,file.locking=off,file.filename=${path.replaceAll(',', ',,')}`
  try {
    const { stdout } = await run('qemu-img', ['map', '--output=json', '--image-opts', image], { maxBuffer: MAX_OUTPUT_BYTES, timeout: DEADLINE_MS, signal })
    const extents = JSON.parse(stdout) as { start: number; length: number; zero: boolean; data: boolean }[]
    const ranges: number[] = []
    for (const { start, length, zero, data } of extents) {
      if (zero && !data) continue
      if (ranges.length > 0 && ranges[ranges.length - 1] === start) ranges[ranges.length - 1] = start + length
      else ranges.push(start, start + length)
    }
    return Float64Array.from(ranges)
  } catch {
    // Not knowing where the holes are costs time, not truth.
    return undefined
  }
}

/** The same of an NBD export with base:allocation. */
export const collectData = async (client: NbdClient, signal: AbortSignal): Promise<DataMap> => {
  const ranges: number[] = []
  for (let at = 0; at < client.sizeBytes && ranges.length < MAX_RANGES; at += STEP_BYTES) {
    let start = at
    for (const { lengthBytes, flags } of (await client.blockStatus(at, Math.min(STEP_BYTES, client.sizeBytes - at), signal)).get('base:allocation') ?? []) {
      if ((flags & STATE_ZERO) === 0) {
        if (ranges.length > 0 && ranges[ranges.length - 1] === start) ranges[ranges.length - 1] = start + lengthBytes
        else ranges.push(start, start + lengthBytes)
      }
      start += lengthBytes
    }
  }
  return ranges.length < MAX_RANGES ? Float64Array.from(ranges) : undefined
}

/** Calls `emit` for the parts of [start, end) in order, saying whether each is a hole. */
export const splitByMap = (map: DataMap, start: number, end: number, emit: (lengthBytes: number, isHole: boolean) => void): void => {
  if (map === undefined) return emit(end - start, false)
  let low = 0
  let high = map.length / 2
  while (low < high) {
    const middle = (low + high) >>> 1
    if (map[middle * 2 + 1] <= start) low = middle + 1
    else high = middle
  }
  let position = start
  for (let at = low * 2; at < map.length && map[at] < end; at += 2) {
    if (map[at] > position) emit(map[at] - position, true)
    const from = Math.max(position, map[at])
    position = Math.min(end, map[at + 1])
    emit(position - from, false)
  }
  if (position < end) emit(end - position, true)
}
