import type { GuestJob } from './channel.ts'
import type { Guest } from './guest.ts'

/**
 * Starts `journal-writer` (test/lab/guest/journal-writer) over some directories, best one on each disk: numbered, checked records, each made durable
 * by fsync before the next one is begun, in turn over the directories. `count` 0 goes on until it is ended by guest.end(job).
 */
export const startJournalWriter = (guest: Guest, dirs: readonly string[], options: { count?: number; name?: string } = {}): GuestJob =>
  guest.start(`journal-writer ${options.name ?? 'main'} ${options.count ?? 0} ${dirs.join(' ')}`)

/** The number of the highest record known durable in the guest; 0 before the first. Asked before a cut is taken: the cut has to hold at least this. */
export const durableRecord = async (guest: Guest, name = 'main'): Promise<number> => Number((await guest.check(`cat /run/lab/writer-${name} 2>/dev/null || echo 0`)).trim())

/** Waits in the guest until that many records are durable. */
export const untilRecord = async (guest: Guest, number: number, options: { name?: string; deadlineMs?: number } = {}): Promise<void> => {
  const file = `/run/lab/writer-${options.name ?? 'main'}`
  await guest.check(`until [ "$(cat ${file} 2>/dev/null || echo 0)" -ge ${number} ]; do usleep 50000; done`, { deadlineMs: options.deadlineMs ?? 60_000 })
}

/** Dependent writes over several guests: record n+1 is sent to the next guest only when record n is durable in its own. checkPrefix takes their texts in this order. */
export class GroupWriter {
  readonly #places: readonly { guest: Guest; dir: string }[]
  readonly #running: Promise<void>
  #durable = 0
  #stopping = false

  constructor(places: readonly { guest: Guest; dir: string }[]) {
    this.#places = places
    this.#running = this.#write()
    this.#running.catch(() => undefined) // stop() reports it
  }

  /** The highest record known durable. */
  get durable(): number {
    return this.#durable
  }

  /** Ends after the record under way; throws what went wrong meanwhile. The highest durable record. */
  async stop(): Promise<number> {
    this.#stopping = true
    await this.#running
    return this.#durable
  }

  async #write(): Promise<void> {
    while (!this.#stopping) {
      const number = this.#durable + 1
      const { guest, dir } = this.#places[(number - 1) % this.#places.length]
      await guest.check(`journal-record ${number} ${dir}`, { deadlineMs: 60_000 })
      this.#durable = number
    }
  }
}

export type IoGap = { writes: number; longestGapMs: number; failed: number }

/** Starts small fsynced writes, `pauseUs` apart (0: without a pause); ioGap() tells the longest time from the end of one to the end of the next. */
export const startGapMeter = (guest: Guest, dir: string, pauseUs = 0): GuestJob => guest.start(`io-gap ${dir}${pauseUs > 0 ? ` ${pauseUs}` : ''}`)

/** What the gap meter has seen so far; the write under way counts with its age. Resolution 10 ms. */
export const ioGap = async (guest: Guest): Promise<IoGap> => {
  const text = await guest.check('cat /run/lab/io-gap /proc/uptime')
  const [writes = 0, longestMs = 0, lastMs = 0, failed = 0, uptimeSeconds = 0] = text.split(/\s+/).map(Number)
  return { writes, longestGapMs: Math.max(longestMs, Math.round(uptimeSeconds * 1000) - lastMs), failed }
}

/** The text of a directory's journal, as checkPrefix takes it, read in a guest. */
export const readJournal = (guest: Guest, dir: string): Promise<string> => guest.check(`cat ${dir}/journal/*.log 2>/dev/null || true`, { deadlineMs: 120_000 })

export type PrefixReport = { ok: boolean; /** The highest record of the prefix. */ last: number; problem?: string }

/**
 * Whether journals read from a recovered system (one text for each directory of the writer, in its order) are together the records 1..last,
 * each whole. A torn record may stand at the end of a text only, and only if it is the one after `last`.
 */
export const checkPrefix = (texts: readonly string[]): PrefixReport => {
  const next = texts.map((_, index) => index + 1)
  const torn: { text: number; expected: number }[] = []
  for (const [text, content] of texts.entries()) {
    const lines = content.split('\n')
    const rest = lines.pop()!
    for (const [index, line] of lines.entries()) {
      if (line !== recordOf(next[text])) return { ok: false, last: next[text] - texts.length, problem: `journal ${text}, line ${index + 1}: not record ${next[text]}: ${JSON.stringify(line.slice(0, 160))}` }
      next[text] += texts.length
    }
    if (rest !== '') torn.push({ text, expected: next[text] })
  }
  const last = Math.min(...next) - 1
  const beyond = next.findIndex((number) => number - texts.length > last)
  if (beyond >= 0) return { ok: false, last, problem: `journal ${beyond} holds record ${next[beyond] - texts.length}, but record ${last + 1} is missing` }
  const early = torn.find(({ expected }) => expected !== last + 1)
  return early ? { ok: false, last, problem: `journal ${early.text} has a part of record ${early.expected}, but record ${last + 1} is missing` } : { ok: true, last }
}

/** Record n without its newline, as the guest's script computes it (64-bit integers that wrap nowhere). */
export const recordOf = (n: number): string => {
  const mask = 2n ** 31n
  let x = (BigInt(n) * 40503n) % mask
  let sum = BigInt(n)
  let filling = ''
  for (let i = 0; i < 8; i++) {
    x = (x * 1103515245n + 12345n) % mask
    sum = (sum * 31n + x) % (mask - 1n)
    filling += `:${x + 1_000_000_000n}`
  }
  return `record ${n + 1_000_000_000} ${filling} ${sum + 1_000_000_000n} end`
}
