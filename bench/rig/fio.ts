import { runTool } from '../../test/lab/index.ts'

export type Load = { rw: 'randwrite' | 'write'; blockBytes: number; depth: number; seconds: number; rateIops?: number; sizeBytes?: number }

export type FioResult = { iops: number; bytesPerSec: number; meanUs: number; p50Us: number; p99Us: number; totalBytes: number; seconds: number }

type FioJson = { jobs: { write: { iops: number; bw_bytes: number; io_bytes: number; runtime: number; clat_ns: { mean: number; percentile?: Record<string, number> } } }[] }

/** Writes to an NBD export with fio's nbd engine. @param uri nbd+unix:///NAME?socket=PATH */
export const fio = async (uri: string, load: Load): Promise<FioResult> => {
  const args = [
    '--name=bench', '--ioengine=nbd', `--uri=${uri}`, `--rw=${load.rw}`, `--bs=${load.blockBytes}`, `--iodepth=${load.depth}`, '--output-format=json', '--randrepeat=0',
    ...(load.sizeBytes === undefined ? ['--time_based', `--runtime=${load.seconds}`] : [`--io_size=${load.sizeBytes}`, `--runtime=${load.seconds}`]),
    ...(load.rateIops === undefined ? [] : [`--rate_iops=${load.rateIops}`]),
  ]
  const { stdout } = await runTool('fio', args, { deadlineMs: (load.seconds + 60) * 1000 })
  const { write } = (JSON.parse(stdout.slice(stdout.indexOf('{'))) as FioJson).jobs[0]
  return {
    iops: write.iops, bytesPerSec: write.bw_bytes, meanUs: write.clat_ns.mean / 1000, p50Us: (write.clat_ns.percentile?.['50.000000'] ?? 0) / 1000,
    p99Us: (write.clat_ns.percentile?.['99.000000'] ?? 0) / 1000, totalBytes: write.io_bytes, seconds: write.runtime / 1000,
  }
}
