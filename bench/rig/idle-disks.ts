import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../../core/errors/index.ts'
import { withQmp } from '../../core/qmp/index.ts'
import { tool } from '../../test/lab/index.ts'

export const IDLE_DISK_BYTES = 1024 ** 3
const START_DEADLINE_MS = 10_000
const nodeOf = (number: number): string => `disk${number}`

/** Disks of many VMs that do next to nothing, all in one qemu-storage-daemon: each with the mirror job that capture uses. */
export class IdleDisks implements AsyncDisposable {
  readonly #child: ChildProcess
  readonly #qmpPath: string
  readonly #nbdPath: string

  private constructor(child: ChildProcess, qmpPath: string, nbdPath: string) {
    this.#child = child
    this.#qmpPath = qmpPath
    this.#nbdPath = nbdPath
  }

  static async start(directory: string): Promise<IdleDisks> {
    const [qmpPath, nbdPath] = [`${directory}/idle.qmp`, `${directory}/idle.nbd`]
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', 'qemu-storage-daemon', '--chardev', `socket,id=qmp,path=${qmpPath},server=on,wait=off`, '--monitor', 'chardev=qmp', '--nbd-server', `addr.type=unix,addr.path=${nbdPath}`], { stdio: ['ignore', 'ignore', 'inherit'] })
    const disks = new IdleDisks(child, qmpPath, nbdPath)
    for (const untilMs = performance.now() + START_DEADLINE_MS; ; await delay(20)) {
      try {
        await withQmp(qmpPath, {}, async () => undefined)
        return disks
      } catch (error) {
        if (child.exitCode === null && performance.now() < untilMs) continue
        await disks[Symbol.asyncDispose]()
        throw new CdpError('IO', 'qemu-storage-daemon does not serve', { cause: error })
      }
    }
  }

  /** One more disk, mirrored into the capture target at `socketPath` from here on. */
  async add(number: number, socketPath: string): Promise<void> {
    const node = nodeOf(number)
    await withQmp(this.#qmpPath, {}, async (qmp) => {
      await qmp.execute('blockdev-add', { driver: 'null-co', 'node-name': node, size: IDLE_DISK_BYTES, 'read-zeroes': true })
      await qmp.execute('block-export-add', { type: 'nbd', id: `export${number}`, 'node-name': node, name: node, writable: true })
      await qmp.execute('blockdev-add', { driver: 'nbd', 'node-name': `target${number}`, export: 'scsi0', server: { type: 'unix', path: socketPath } })
      await qmp.execute('blockdev-mirror', { 'job-id': `mirror${number}`, device: node, target: `target${number}`, sync: 'none', 'copy-mode': 'write-blocking', granularity: 4096, 'on-target-error': 'report' })
      await qmp.waitForEvent(({ event, data }) => event === 'BLOCK_JOB_READY' && data['device'] === `mirror${number}`, { deadlineMs: 10_000 })
    })
  }

  /** What an idle guest writes now and then: a few blocks of a log, some more of a file. */
  write(number: number): Promise<void> {
    return this.#writes(number, ['0 4k', '1M 4k', '8M 64k'])
  }

  /** What makes it busy for a moment. */
  burst(number: number): Promise<void> {
    return this.#writes(number, ['64M 10M', '0 2M'])
  }

  async #writes(number: number, ranges: readonly string[]): Promise<void> {
    await tool('qemu-io', ['-f', 'raw', ...ranges.flatMap((range) => ['-c', `write -P 1 ${range}`]), `nbd+unix:///${nodeOf(number)}?socket=${this.#nbdPath}`])
  }

  /** How many of the mirror jobs are still there. */
  mirrored(): Promise<number> {
    return withQmp(this.#qmpPath, {}, async (qmp) => ((await qmp.execute('query-block-jobs')) as unknown[]).length)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return
    const ended = once(this.#child, 'exit')
    this.#child.kill('SIGKILL')
    await ended
  }
}
