import { readFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { tool } from '../../test/lab/index.ts'

export type Load = { rw: 'randwrite' | 'write' | 'randread'; blockBytes: number; depth: number; seconds: number; rateIops?: number; sizeBytes?: number }

export type FioResult = {
  iops: number
  bytesPerSec: number
  meanUs: number
  p50Us: number
  p99Us: number
  totalBytes: number
  seconds: number
  /** When the last write was answered, if `directory` was given. */
  endedAtUnixMs: number
}

export type FioOptions = {
  signal?: AbortSignal
  /** Where fio may write; makes it tell the time at which the job ended. */
  directory?: string
}

type FioSide = { iops: number; bw_bytes: number; io_bytes: number; runtime: number; clat_ns: { mean: number; percentile?: Record<string, number> } }
type FioJson = { jobs: { read: FioSide; write: FioSide }[] }

/** Writes to, or reads from, an NBD export with fio's nbd engine. @param uri nbd+unix:///NAME?socket=PATH */
export const fio = async (uri: string, load: Load, { signal, directory }: FioOptions = {}): Promise<FioResult> => {
  const args = [
    '--name=bench', '--ioengine=nbd', `--uri=${uri}`, `--rw=${load.rw}`, `--bs=${load.blockBytes}`, `--iodepth=${load.depth}`, '--output-format=json', '--randrepeat=0',
    '--verify_state_save=0',
    // Else fio writes the same few buffers again and again, and a frame of small writes would compress a hundredfold.
    ...(load.blockBytes < 1024 * 1024 ? ['--refill_buffers'] : []),
    ...(load.sizeBytes === undefined ? ['--time_based', `--runtime=${load.seconds}`] : [`--io_size=${load.sizeBytes}`, `--runtime=${load.seconds}`]),
    ...(load.rateIops === undefined ? [] : [`--rate_iops=${Math.round(load.rateIops)}`]),
    ...(directory === undefined ? [] : ['--exec_postrun=date +%s%3N']),
  ]
  const { stdout } = await tool('fio', args, { deadlineMs: (load.seconds + 60) * 1000, cwd: directory ?? tmpdir(), ...(signal === undefined ? {} : { signal }) })
  const { read, write } = (JSON.parse(stdout.slice(stdout.indexOf('\n{') + 1)) as FioJson).jobs[0]
  const side = load.rw === 'randread' ? read : write
  return {
    iops: side.iops, bytesPerSec: side.bw_bytes, meanUs: side.clat_ns.mean / 1000, p50Us: (side.clat_ns.percentile?.['50.000000'] ?? 0) / 1000,
    p99Us: (side.clat_ns.percentile?.['99.000000'] ?? 0) / 1000, totalBytes: side.io_bytes, seconds: side.runtime / 1000,
    endedAtUnixMs: directory === undefined ? Date.now() : Number(readFileSync(`${directory}/bench.postrun.txt`, 'utf8')),
  }
}
