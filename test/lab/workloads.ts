import { CdpError } from '../../core/errors/index.ts'
import type { GuestJob } from './channel.ts'
import type { Guest } from './guest.ts'

/**
 * Starts `journal-writer` (test/lab/guest/journal-writer) over some directories, best one on each disk: numbered, checked records, each made durable
 * by fsync before the next one is begun, in turn over the directories. `count` 0 goes on until it is ended by guest.end(job).
 */
export const startJournalWriter = (guest: Guest, dirs: readonly string[], count = 0): GuestJob => guest.start(`journal-writer ${count} ${dirs.join(' ')}`)

/** The number of the highest record known durable in the guest; 0 before the first. Asked before a cut is taken: the cut has to hold at least this. */
export const durableRecord = async (guest: Guest): Promise<number> => Number((await guest.check('cat /run/lab/journal-writer 2>/dev/null || echo 0')).trim())

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

/** MD5 sums by path below the directory. */
export type Manifest = Map<string, string>

/** Writes `count` text files with content that depends on the seed; durable when it returns. */
export const writeDocuments = async (guest: Guest, dir: string, count: number, seed: number): Promise<Manifest> => {
  const manifest = parseManifest(await guest.check(`documents ${dir} ${count} ${seed}`, { deadlineMs: 120_000 }))
  if (manifest.size !== count) throw new CdpError('IO', `${manifest.size} documents were written instead of ${count}`)
  return manifest
}

/** The files below a directory as they are now. */
export const manifestOf = async (guest: Guest, dir: string): Promise<Manifest> => parseManifest(await guest.check(`cd ${dir} && find . -type f | sort | xargs md5sum`, { deadlineMs: 120_000 }))

/** Overwrites and renames every document; the number of files lost. */
export const runRansomware = async (guest: Guest, dir: string): Promise<number> => Number((await guest.check(`ransomware ${dir}`, { deadlineMs: 120_000 })).trim())

/** Paths that differ between two manifests or stand in one only. */
export const manifestDifferences = (before: Manifest, after: Manifest): string[] =>
  [...new Set([...before.keys(), ...after.keys()])].filter((path) => before.get(path) !== after.get(path)).sort()

const parseManifest = (text: string): Manifest =>
  new Map(
    text
      .split('\n')
      .filter(Boolean)
      .map((line): [string, string] => [line.slice(34), line.slice(0, 32)]),
  )
