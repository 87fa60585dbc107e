import { join } from 'node:path'
import { readJsonFile, writeJsonFile } from '../../core/files/index.ts'

/** A pass over one VM, and how far it has come. Segments after `lastSegment` were made since it began, and are for the next one. */
export type Pass = { startedAtUnixMs: number; nextSegment: number; lastSegment: number; mirror: { disk: number; offsetBytes: number }; readBytes: number; damagedFound: number }
export type PassResult = { startedAtUnixMs: number; endedAtUnixMs: number; readBytes: number; damagedFound: number }

/** `scrub.json` of a VM (docs/format.md): lost, a pass begins anew. */
export type ScrubRecord = { format: 1; pass?: Pass | undefined; last?: PassResult | undefined }

const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && (value as number) >= -1
const isObject = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null && !Array.isArray(value)
const isPass = (value: unknown): boolean =>
  isObject(value) && [value.startedAtUnixMs, value.nextSegment, value.lastSegment, value.readBytes, value.damagedFound].every(isCount) && isObject(value.mirror) && isCount(value.mirror.disk) && isCount(value.mirror.offsetBytes)
const isResult = (value: unknown): boolean => isObject(value) && [value.startedAtUnixMs, value.endedAtUnixMs, value.readBytes, value.damagedFound].every(isCount)

const recordPath = (vmDirectory: string): string => join(vmDirectory, 'scrub.json')

export const readScrubRecord = async (vmDirectory: string): Promise<ScrubRecord> => {
  const json = await readJsonFile(recordPath(vmDirectory)).catch(() => undefined)
  if (!isObject(json) || json.format !== 1) return { format: 1 }
  return { format: 1, ...(isPass(json.pass) ? { pass: json.pass as Pass } : {}), ...(isResult(json.last) ? { last: json.last as PassResult } : {}) }
}

/** @throws Node's error */
export const writeScrubRecord = (vmDirectory: string, record: ScrubRecord): Promise<void> => writeJsonFile(recordPath(vmDirectory), record)

/**
 * Whether a pass is to begin: `everyMs` after the last one began. Wall time, since it outlives the agent; a record from the future was written
 * under a wrong clock and counts for nothing.
 */
export const isDue = ({ last }: ScrubRecord, everyMs: number, nowUnixMs: number): boolean =>
  everyMs > 0 && (last === undefined || nowUnixMs - last.startedAtUnixMs >= everyMs || last.startedAtUnixMs > nowUnixMs + everyMs)
