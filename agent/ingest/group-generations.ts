import { mkdir } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { CdpError } from '../../core/errors/index.ts'
import { readJsonFile, writeJsonFile } from '../../core/files/index.ts'
import { FIRST_GENERATION } from '../../core/stream/index.ts'

/** Who owns a group, as a number that only grows; `why` and `raisedAtUnixMs`: of the last handover. */
export type GroupGeneration = { generation: number; why?: string; raisedAtUnixMs?: number }

const isGeneration = (value: unknown): value is GroupGeneration & { format: 1 } => {
  const { format, generation, why, raisedAtUnixMs } = (value ?? {}) as { [Key in keyof GroupGeneration]: unknown } & { format?: unknown }
  return format === 1 && Number.isSafeInteger(generation) && (generation as number) >= FIRST_GENERATION && (why === undefined || typeof why === 'string') && (raisedAtUnixMs === undefined || Number.isSafeInteger(raisedAtUnixMs))
}

/** `generations/<site>/<vpg>.json` of the agent's state (docs/format.md, Generation). What cannot be read lets nobody in: it may say that the group was handed over. */
export class GroupGenerations {
  readonly #directory: string
  readonly #nowUnixMs: () => number
  readonly #known = new Map<string, GroupGeneration>()
  readonly #loading = new Map<string, Promise<GroupGeneration>>()
  #changes: Promise<unknown> = Promise.resolve()

  constructor(directory: string, nowUnixMs: () => number) {
    this.#directory = directory
    this.#nowUnixMs = nowUnixMs
  }

  /** @throws CdpError FORMAT if the file cannot be believed; Node's error */
  load(siteId: string, vpg: string): Promise<GroupGeneration> {
    const path = this.#path(siteId, vpg)
    // Who asks at the same time is answered in order.
    const loading = this.#loading.get(path) ?? this.#load(path).finally(() => this.#loading.delete(path))
    this.#loading.set(path, loading)
    return loading
  }

  /** What was loaded or raised last; for the status, and where nothing may wait. */
  known(siteId: string, vpg: string): GroupGeneration {
    return this.#known.get(this.#path(siteId, vpg)) ?? { generation: FIRST_GENERATION }
  }

  /** The next generation, durable when this resolves. @throws as load; nothing was changed then */
  raise(siteId: string, vpg: string, why: string): Promise<GroupGeneration> {
    const raised = this.#changes.then(async () => {
      const path = this.#path(siteId, vpg)
      const { generation } = await this.load(siteId, vpg)
      const next = { generation: generation + 1, why, raisedAtUnixMs: this.#nowUnixMs() }
      await mkdir(dirname(path), { recursive: true, mode: 0o700 })
      await writeJsonFile(path, { format: 1, ...next })
      this.#known.set(path, next)
      return next
    })
    this.#changes = raised.catch(() => undefined)
    return raised
  }

  async #load(path: string): Promise<GroupGeneration> {
    const known = this.#known.get(path)
    if (known !== undefined) return known
    const file = await readJsonFile(path)
    if (file !== undefined && !isGeneration(file)) throw new CdpError('FORMAT', `${path} does not say who owns the group`, { hint: 'Restore it from a backup; until then nothing of this group is taken.' })
    const { generation = FIRST_GENERATION, why, raisedAtUnixMs } = file ?? {}
    const found = { generation, ...(why === undefined ? {} : { why }), ...(raisedAtUnixMs === undefined ? {} : { raisedAtUnixMs }) }
    this.#known.set(path, found)
    return found
  }

  #path(siteId: string, vpg: string): string {
    return join(this.#directory, encodeURIComponent(siteId), `${encodeURIComponent(vpg)}.json`)
  }
}
