import { cpSync, existsSync, linkSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { tool } from '../../test/lab/index.ts'
import type { SyntheticJournal } from '../synthetic-journal.ts'
import { benchCacheDirectory } from './disk-directory.ts'

/** The VM that synthetic journals are of. */
export const JOURNAL_VM = '101'
const SEED = 1
const GENERATE_DEADLINE_MS = 60 * 60_000
/** From here on a journal is worth keeping for the next run. */
const CACHED_FROM_RECORDS = 5_000_000

export type BenchJournal = { directory: string; records: number; lastSeq: number; bytes: number; generatedMs: number | undefined }

export type JournalOptions = { records: number; diskBytes: number; diskDirectory: string; say: (line: string) => void; signal: AbortSignal }

/** A VM's directory with a journal of that many records, the caller's to change. Large ones are made once and kept below .cache/bench. */
export const benchJournal = async (options: JournalOptions): Promise<BenchJournal> => {
  const { records, diskBytes, diskDirectory, say, signal } = options
  const name = `journal-${records}-${diskBytes}`
  const directory = join(diskDirectory, name)
  if (records < CACHED_FROM_RECORDS) return { ...(await generate(directory, options)), directory }
  const cached = join(benchCacheDirectory(), name)
  let generatedMs: number | undefined
  if (!existsSync(cached)) {
    say(`a journal of ${records} records is made once and kept in ${cached}; this takes a while`)
    const made = await generate(directory, { ...options, signal })
    generatedMs = made.generatedMs
    renameSync(directory, cached)
    say(`made in ${((generatedMs ?? 0) / 1000).toFixed(0)} s: ${(made.bytes / 2 ** 30).toFixed(1)} GiB`)
  }
  linkCopy(cached, directory)
  const { lastSeq, bytes } = JSON.parse(readFileSync(join(cached, 'bench.json'), 'utf8')) as { lastSeq: number; bytes: number }
  return { directory, records, lastSeq, bytes, generatedMs }
}

/** Runs in a process of its own: it is busy for as long as it takes. */
const generate = async (directory: string, { records, diskBytes, signal }: JournalOptions): Promise<BenchJournal> => {
  const program = join(import.meta.dirname, '../synthetic-journal.js')
  const { stdout } = await tool(process.execPath, [program, '--directory', directory, '--records', String(records), '--disk', String(diskBytes), '--seed', String(SEED)], {
    deadlineMs: GENERATE_DEADLINE_MS, signal,
  })
  const { lastSeq, elapsedMs } = JSON.parse(stdout) as SyntheticJournal
  const bytes = allocatedBytes(directory)
  writeFileSync(join(directory, 'bench.json'), JSON.stringify({ lastSeq, bytes }))
  return { directory, records, lastSeq, bytes, generatedMs: elapsedMs }
}

/** Sealed segments and runs never change: hard links of them do. What may be written to is copied. */
const linkCopy = (from: string, to: string): void => {
  rmSync(to, { recursive: true, force: true })
  for (const folder of ['journal', 'runs', 'mirror']) {
    mkdirSync(join(to, folder), { recursive: true })
    const names = readdirSync(join(from, folder)).sort()
    for (const name of names) {
      const isOpen = folder === 'journal' && name === names.at(-1)
      // The mirrors of these journals are blank: copied, their holes would become data.
      if (folder === 'mirror') makeSparse(join(to, folder, name), statSync(join(from, folder, name)).size)
      else if (isOpen) cpSync(join(from, folder, name), join(to, folder, name))
      else linkSync(join(from, folder, name), join(to, folder, name))
    }
  }
  cpSync(join(from, 'vm.json'), join(to, 'vm.json'))
}

const makeSparse = (path: string, sizeBytes: number): void => {
  writeFileSync(path, '')
  truncateSync(path, sizeBytes)
}

/** Bytes of all files below a directory, holes left out. */
export const allocatedBytes = (directory: string): number =>
  readdirSync(directory, { recursive: true, encoding: 'utf8' }).reduce((sum, name) => {
    const { blocks } = statSync(join(directory, name))
    return sum + blocks * 512
  }, 0)
