import { join } from 'node:path'
import { errorMessage } from '../../core/errors/index.ts'
import { readJsonFile, writeJsonFile } from '../../core/files/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { isInside } from './segment-info.ts'
import type { Damage, DamageList, SegmentInfo } from './segment-info.ts'

/** A part of a mirror disk that is not what was written to it. */
export type MirrorDamage = { disk: number; offsetBytes: number; lengthBytes: number; what: string; foundAtUnixMs: number; healedFromSeq?: number }
/** Checkpoints of the VM from `fromSeq` up to before `toSeq` need something that is damaged. */
export type DamagedSpan = { fromSeq: number; toSeq: number }

export type DamageFile = { format: 1; journal: Damage[]; mirror: MirrorDamage[] }
export const DAMAGE_FILE = 'damage.json'
const MAX_MIRROR = 4096

const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && (value as number) >= 0
const isMissingOrCount = (value: unknown): boolean => value === undefined || isCount(value)
const isObject = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null && !Array.isArray(value)
const isDamage = (value: unknown): value is Damage =>
  isObject(value) && isCount(value.segment) && isCount(value.firstSeq) && isCount(value.lastSeq) && typeof value.what === 'string' &&
  isMissingOrCount(value.fromBytes) && isMissingOrCount(value.toBytes) && isMissingOrCount(value.healedFromSeq) && isCount(value.foundAtUnixMs)
const isMirrorDamage = (value: unknown): value is MirrorDamage =>
  isObject(value) && isCount(value.disk) && isCount(value.offsetBytes) && isCount(value.lengthBytes) && typeof value.what === 'string' && isCount(value.foundAtUnixMs) && isMissingOrCount(value.healedFromSeq)

/** What `damage.json` says; nothing if there is none or it cannot be believed: a scrub finds it again. */
export const readDamageFile = async (vmDirectory: string, log?: Logger): Promise<DamageFile> => {
  try {
    const json = await readJsonFile(join(vmDirectory, DAMAGE_FILE))
    if (isObject(json) && json.format === 1 && Array.isArray(json.journal) && Array.isArray(json.mirror)) {
      return { format: 1, journal: json.journal.filter(isDamage), mirror: json.mirror.filter(isMirrorDamage) }
    }
    if (json !== undefined) log?.error('the list of damage cannot be believed; the next scrub finds it again', { vmDirectory })
  } catch (error) {
    log?.error('the list of damage cannot be read; the next scrub finds it again', { vmDirectory, error: errorMessage(error) })
  }
  return { format: 1, journal: [], mirror: [] }
}

/**
 * What is known to be damaged of one VM, kept in `damage.json` (docs/format.md). In memory it holds at once, on disk after `save`; a full disk
 * keeps nobody from knowing it until the agent ends.
 */
export class DamageBook {
  readonly #directory: string
  readonly #list: DamageList
  #mirror: readonly MirrorDamage[]
  #isSaved = true

  constructor(directory: string, list: DamageList, file: DamageFile) {
    this.#directory = directory
    this.#list = list
    this.#mirror = file.mirror
    for (const damage of file.journal) list.add(damage)
  }

  /** Met by somebody, and not looked at by a scrub yet. */
  get unconfirmed(): Damage[] {
    return this.#list.all().filter(({ foundAtUnixMs }) => foundAtUnixMs === undefined)
  }

  get journal(): Damage[] {
    return this.#list.all().filter(({ foundAtUnixMs }) => foundAtUnixMs !== undefined)
  }

  get mirror(): readonly MirrorDamage[] {
    return this.#mirror
  }

  get isSaved(): boolean {
    return this.#isSaved
  }

  /** A segment was read through: these stretches are damaged, and nothing else of it. */
  confirmSegment(info: SegmentInfo, found: readonly Omit<Damage, 'foundAtUnixMs'>[], atUnixMs: number): void {
    const before = this.#list.all().filter((damage) => isInside(info, damage))
    const after = found.map((damage) => {
      const known = before.find((one) => one.firstSeq === damage.firstSeq && one.lastSeq === damage.lastSeq && one.foundAtUnixMs !== undefined)
      return { ...damage, foundAtUnixMs: known?.foundAtUnixMs ?? atUnixMs, ...(known?.healedFromSeq === undefined ? {} : { healedFromSeq: known.healedFromSeq }) }
    })
    if (JSON.stringify(before) === JSON.stringify(after)) return
    this.#list.replace(info, after)
    this.#isSaved = false
  }

  /** What was met and no scrub can look at, since it is about no segment that there is. */
  confirm(damage: Damage, atUnixMs: number): void {
    this.#list.update((one) => (one === damage ? { ...one, foundAtUnixMs: atUnixMs } : one))
    this.#isSaved = false
  }

  /** What is damaged of a part of a mirror disk, replacing what was said of it. */
  confirmMirror(disk: number, offsetBytes: number, lengthBytes: number, found: readonly MirrorDamage[]): void {
    const isOther = (one: MirrorDamage): boolean => one.disk !== disk || one.offsetBytes >= offsetBytes + lengthBytes || one.offsetBytes + one.lengthBytes <= offsetBytes
    const isKnown = (damage: MirrorDamage) => this.#mirror.find((one) => one.disk === disk && one.offsetBytes === damage.offsetBytes && one.lengthBytes === damage.lengthBytes)
    const next = [...this.#mirror.filter(isOther), ...found.map((damage) => isKnown(damage) ?? damage)]
    if (next.length === this.#mirror.length && next.every((damage) => this.#mirror.includes(damage))) return
    this.#mirror = next.slice(0, MAX_MIRROR)
    this.#isSaved = false
  }

  /** No state from `healedFromSeq` on needs it. */
  heal(damage: Damage | MirrorDamage, healedFromSeq: number | undefined): void {
    if (damage.healedFromSeq === healedFromSeq) return
    const healed = <T extends object>(one: T): T => ({ ...one, healedFromSeq })
    this.#list.update((one) => (one === damage ? healed(one) : one))
    this.#mirror = this.#mirror.map((one) => (one === damage ? healed(one) : one))
    this.#isSaved = false
  }

  /** The base is at `baseSeq`: what of the mirror was written again by then is whole. */
  baseMoved(baseSeq: number): void {
    const mirror = this.#mirror.filter(({ healedFromSeq }) => healedFromSeq === undefined || healedFromSeq > baseSeq)
    if (mirror.length === this.#mirror.length) return
    this.#mirror = mirror
    this.#isSaved = false
  }

  /** The segments before this one are gone, with what was damaged in them. */
  segmentsGone(firstSegment: number): void {
    const before = this.#list.all().length
    this.#list.update((one) => (one.segment < firstSegment ? undefined : one))
    if (this.#list.all().length < before) this.#isSaved = false
  }

  /** Which checkpoints need something damaged, by their place in the journal. */
  spans(): DamagedSpan[] {
    return [
      ...this.journal.map(({ firstSeq, healedFromSeq }) => ({ fromSeq: firstSeq, toSeq: healedFromSeq ?? Number.MAX_SAFE_INTEGER })),
      ...this.#mirror.map(({ healedFromSeq }) => ({ fromSeq: 0, toSeq: healedFromSeq ?? Number.MAX_SAFE_INTEGER })),
    ]
  }

  /** @throws Node's error; it holds in memory, and the next call tries again */
  async save(): Promise<void> {
    if (this.#isSaved) return
    const file: DamageFile = { format: 1, journal: this.journal, mirror: [...this.#mirror] }
    this.#isSaved = true
    try {
      await writeJsonFile(join(this.#directory, DAMAGE_FILE), file)
    } catch (error) {
      this.#isSaved = false
      throw error
    }
  }
}
