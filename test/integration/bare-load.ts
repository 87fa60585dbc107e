import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { promisify } from 'node:util'
import { asList, asObject, stringField } from '../../core/qmp/index.ts'
import { ioThreadOf } from './bare-vm.ts'
import type { BareVm } from './bare-vm.ts'

// Load for a bare VM. Writes enter through a writable NBD export of the drive's root node, in the drive's own iothread. An
// export made before the attach is carried along: QEMU puts the mirror's filter between the root node and all its users. The
// device needs share-rw=on. The guest's own counters (query-blockstats) do not see these writes: see boot-sector.ts for those.

const run = promisify(execFile)

export const nbdUri = (socketPath: string, exportName: string): string => `nbd+unix:///${exportName}?socket=${socketPath}`

/** Exports each drive's root node writable under the disk's key. Call it before capture is attached. Returns the socket. */
export const openWriteDoor = async (vm: BareVm): Promise<string> => {
  const socketPath = `${vm.dir}/door`
  await vm.qmp(async (qmp) => {
    await qmp.execute('nbd-server-start', { addr: { type: 'unix', data: { path: socketPath } }, 'max-connections': 0 })
    const devices = asList(await qmp.execute('query-block'), 'query-block').map((value) => asObject(value, 'device'))
    for (const { key } of vm.disks) {
      const device = devices.find((candidate) => typeof candidate['qdev'] === 'string' && candidate['qdev'].split('/').includes(key))
      const node = stringField(asObject(device?.['inserted'], 'inserted'), 'node-name')
      await untilAccepted(() => qmp.execute('block-export-add', {
        type: 'nbd', id: `door-${key}`, 'node-name': node, name: key, writable: true, iothread: ioThreadOf(key), 'fixed-iothread': true }))
    }
  })
  return socketPath
}

// virtio-blk refuses its iothread to others until the firmware has started the device.
const untilAccepted = async (act: () => Promise<unknown>): Promise<void> => {
  const endsAtMs = performance.now() + 10_000
  while (true) {
    try {
      await act()
      return
    } catch (error) {
      if (!String(error).includes('Cannot change iothread') || performance.now() > endsAtMs) throw error
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }
}

export type FioLoad = {
  /** Ends fio and returns its report of writes. Rejects if fio saw an I/O error. */
  stop: () => Promise<FioWrites>
  ended: Promise<FioWrites>
  [Symbol.asyncDispose]: () => Promise<void>
}
export type FioWrites = { iops: number; totalBytes: number; p99Ms: number; longestMs: number }

/** Random writes by fio's nbd engine until `stop` or the given number of writes. */
export const startFio = (uri: string, options: { sizeBytes: number; depth?: number; writes?: number; writesPerSec?: number; seed: number }): FioLoad => {
  const limit = options.writes === undefined ? ['--time_based', '--runtime=600'] : [`--number_ios=${options.writes}`]
  const child = spawn('fio', ['--thread', '--name=load', '--ioengine=nbd', `--uri=${uri}`, '--rw=randwrite', '--bs=4k', `--iodepth=${options.depth ?? 32}`, `--size=${options.sizeBytes}`,
    '--norandommap=1', '--random_generator=tausworthe64', `--randseed=${options.seed}`, '--refill_buffers=1', '--output-format=json', ...limit, ...(options.writesPerSec === undefined ? [] : [`--rate_iops=${options.writesPerSec}`])], { stdio: ['ignore', 'pipe', 'pipe'] })
  let stdout = ''
  let stderr = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text))
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text))
  const ended = once(child, 'close').then(() => {
    type Report = { jobs: { error: number; write: { iops: number; io_bytes: number; clat_ns: { max: number; percentile: Record<string, number> } } }[] }
    const report = JSON.parse(stdout.slice(stdout.indexOf('{'))) as Report
    const [job] = report.jobs
    if (!job || job.error !== 0) throw new Error(`fio saw error ${job?.error}: ${stderr}`)
    return { iops: job.write.iops, totalBytes: job.write.io_bytes, p99Ms: job.write.clat_ns.percentile['99.000000'] / 1e6, longestMs: job.write.clat_ns.max / 1e6 }
  })
  ended.catch(() => undefined)
  return {
    ended,
    stop: () => {
      child.kill('SIGINT')
      return ended
    },
    [Symbol.asyncDispose]: async () => {
      child.kill('SIGKILL')
      await ended.catch(() => undefined)
    },
  }
}

/** Writes one pattern through an NBD export. */
export const writePattern = async (uri: string, pattern: number, offsetBytes: number, lengthBytes: number): Promise<void> => {
  const { stdout } = await run('qemu-io', ['-f', 'raw', '-c', `write -P ${pattern} ${offsetBytes} ${lengthBytes}`, uri])
  if (!stdout.includes(`wrote ${lengthBytes}`)) throw new Error(`qemu-io: ${stdout}`)
}

/** True if both images hold the same bytes. */
export const sameContent = async (one: string, other: string, otherFormat: 'raw' | 'qcow2' = 'raw'): Promise<boolean> => {
  try {
    await run('qemu-img', ['compare', '-U', '-f', 'raw', '-F', otherFormat, one, other])
    return true
  } catch (error) {
    const { code, stderr } = error as { code?: number; stderr?: string }
    if (code === 1) return false
    throw new Error(`qemu-img compare: ${stderr}`, { cause: error })
  }
}

export type Extent = { offset: number; length: number; type: number }

/** Extents of one metadata context, by nbdinfo. */
export const mapOf = async (uri: string, context: string): Promise<Extent[]> => {
  const { stdout } = await run('nbdinfo', [`--map=${context}`, '--json', uri], { maxBuffer: 256 * 1024 * 1024 })
  return JSON.parse(stdout) as Extent[]
}
