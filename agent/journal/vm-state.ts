import { open, readFile, rename, rm } from 'node:fs/promises'
import { dirname } from 'node:path'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { DiskMark } from './frame-checks.ts'

/** `vm.json` (docs/format.md, "Mirror"). */
export type VmState = {
  format: 1
  vm: string
  /** The attach that may append; 0 before the first. */
  epoch: number
  /** The initial sync has ended; `baseSeq` is what the mirror holds. */
  baseComplete: boolean
  baseSeq: number
  /** A promotion to this sequence has begun: the mirror holds parts of what lies up to it, and nothing below it can be recovered any more. */
  promotingToSeq?: number | undefined
  /** While the base is not complete: the last sequence applied to the mirror. */
  directSeq: number
  /** By disk number: everything below was copied by the initial sync. */
  syncProgress: Record<string, number>
  disks: DiskEntry[]
  /** The disks that it had up to a sequence, and not behind it; ascending, as far as the history goes back. */
  disksBefore?: { upToSeq: number; disks: DiskEntry[] }[]
}

export const newVmState = (vm: string): VmState => ({ format: 1, vm, epoch: 0, baseComplete: false, baseSeq: 0, directSeq: 0, syncProgress: {}, disks: [] })

const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && (value as number) >= 0
const isObject = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null && !Array.isArray(value)
const isDisk = (value: unknown): boolean => isObject(value) && isCount(value.disk) && typeof value.key === 'string' && isCount(value.sizeBytes) && (value.joining === undefined || value.joining === true)

/** @throws CdpError FORMAT */
export const parseVmState = (text: string): VmState => {
  let json: unknown
  try {
    json = JSON.parse(text)
  } catch (cause) {
    throw new CdpError('FORMAT', 'vm.json is not JSON', { cause })
  }
  if (!isObject(json) || json.format !== 1) throw new CdpError('FORMAT', 'vm.json is of an unknown format')
  const counts = isCount(json.epoch) && isCount(json.baseSeq) && isCount(json.directSeq) && (json.promotingToSeq === undefined || isCount(json.promotingToSeq))
  const progress = isObject(json.syncProgress) && Object.values(json.syncProgress).every(isCount)
  const disks = Array.isArray(json.disks) && json.disks.every(isDisk)
  const before = json.disksBefore === undefined || (Array.isArray(json.disksBefore) && json.disksBefore.every((one) => isObject(one) && isCount(one.upToSeq) && Array.isArray(one.disks) && one.disks.every(isDisk)))
  if (typeof json.vm !== 'string' || typeof json.baseComplete !== 'boolean' || !counts || !progress || !disks || !before) {
    throw new CdpError('FORMAT', 'vm.json lacks a field or has one of a wrong type')
  }
  return json as VmState
}

/** The lowest sequence that can still be recovered: what the mirror holds, or is being brought to. */
export const recoverableFrom = ({ baseSeq, promotingToSeq }: VmState): number => Math.max(baseSeq, promotingToSeq ?? 0)

/** The disks as of a sequence: those that were whole then. */
export const disksAt = ({ disks, disksBefore = [] }: VmState, seq: number): readonly DiskEntry[] =>
  (disksBefore.find(({ upToSeq }) => seq <= upToSeq)?.disks ?? disks).filter(({ joining }) => joining !== true)

/** The state with other disks behind `lastSeq`; what they were before is kept for as long as something of that time can be recovered. */
export const withDisks = (state: VmState, disks: DiskEntry[], lastSeq: number): VmState => {
  if (!state.baseComplete || JSON.stringify(disks) === JSON.stringify(state.disks)) return { ...state, disks }
  const before = (state.disksBefore ?? []).filter(({ upToSeq }) => upToSeq >= recoverableFrom(state))
  // With no record since the last change nothing was ever recovered with those of between.
  if ((before.at(-1)?.upToSeq ?? -1) < lastSeq) before.push({ upToSeq: lastSeq, disks: state.disks })
  return { ...state, disks, disksBefore: before }
}

/** The state after a record that changes a disk. */
export const afterMark = (state: VmState, mark: DiskMark): VmState =>
  withDisks(state, mark.is === 'resize' ? resized(state.disks, mark.disk, mark.sizeBytes) : joined(state.disks, mark.disk), mark.seq - 1)

/** The disks with one of them grown. */
export const resized = (disks: DiskEntry[], disk: number, sizeBytes: number): DiskEntry[] => disks.map((one) => (one.disk === disk && one.sizeBytes < sizeBytes ? { ...one, sizeBytes } : one))

const joined = (disks: DiskEntry[], disk: number): DiskEntry[] => disks.map((one) => (one.disk === disk ? { disk, key: one.key, sizeBytes: one.sizeBytes } : one))

/** The state in `path`, or undefined if there is no such file. @throws CdpError FORMAT */
export const loadVmState = async (path: string): Promise<VmState | undefined> => {
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined
    throw error
  }
  return parseVmState(text)
}

/** Makes the names in a directory durable. */
export const syncDirectory = async (directory: string): Promise<void> => {
  const handle = await open(directory, 'r')
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}

/** Write, fsync, rename, fsync of the directory: after this returns, the new state is what a crash leaves. */
export const saveVmState = async (path: string, state: VmState): Promise<void> => {
  const temporary = `${path}.new`
  try {
    const handle = await open(temporary, 'w', 0o640)
    try {
      await handle.writeFile(JSON.stringify(state, undefined, 1))
      await handle.sync()
    } finally {
      await handle.close()
    }
  } catch (error) {
    await rm(temporary, { force: true })
    throw error
  }
  await rename(temporary, path)
  await syncDirectory(dirname(path))
}
