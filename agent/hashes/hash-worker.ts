import { parentPort } from 'node:worker_threads'
import { toCdpError } from '../../core/errors/index.ts'
import type { ErrorCode } from '../../core/errors/index.ts'
import type { ExtentHashes } from '../../core/stream/index.ts'
import { hashExtents } from './hash-extents.ts'
import type { ExtentRange } from './hash-extents.ts'
import { ReaderCache } from './reader-cache.ts'

// Worker thread of HashDesk: one job at a time in, its answer out. `key` names what a reader stays open for: a stream's attach and a sequence.

export type HashJob = ({ is: 'hash'; vmDirectory: string; key: string; seq: number } & ExtentRange) | { is: 'close'; key: string }
export type HashJobAnswer = ExtentHashes | { error: { code: ErrorCode; message: string } } | { closed: true }

const readers = new ReaderCache()

const perform = async (job: HashJob): Promise<HashJobAnswer> => {
  if (job.is === 'close') {
    await readers.close(job.key)
    return { closed: true }
  }
  return hashExtents(await readers.get(job.key, job.vmDirectory, job.seq), job)
}

parentPort?.on('message', (job: HashJob) => {
  perform(job).then(
    (answer) => parentPort?.postMessage(answer),
    (thrown: unknown) => {
      const { code, message } = toCdpError(thrown, 'IO')
      parentPort?.postMessage({ error: { code, message } })
    },
  )
})
