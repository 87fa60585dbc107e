import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { rmSync, writeFileSync } from 'node:fs'
import { Monitor } from './monitor.ts'
import { tool } from './process.ts'
import { until } from './sites.ts'

export type FuseDiskOptions = {
  /** An image; what is beside it has its name and an ending. */
  backing: string
  /** Arguments of qemu-storage-daemon: nodes upon the node "file". */
  nodes: readonly string[]
  /** The uppermost of them. */
  top: string
}

/** A block device whose every access goes through qemu-storage-daemon: a loop device over a file that it serves through FUSE. (A kernel without modules has no device-mapper.) */
export class FuseDisk implements AsyncDisposable {
  readonly loop: string
  readonly monitor: Monitor
  readonly #stack: AsyncDisposableStack

  private constructor(loop: string, monitor: Monitor, stack: AsyncDisposableStack) {
    this.loop = loop
    this.monitor = monitor
    this.#stack = stack
  }

  static async start({ backing, nodes, top }: FuseDiskOptions): Promise<FuseDisk> {
    await using stack = new AsyncDisposableStack()
    const [served, qmp] = [`${backing}.fuse`, `${backing}.qmp`]
    stack.defer(() => [served, qmp].forEach((file) => rmSync(file, { force: true })))
    writeFileSync(served, '')
    const daemon = spawn('setpriv', ['--pdeathsig', 'KILL', '--', 'qemu-storage-daemon',
      '--chardev', `socket,id=qmp,path=${qmp},server=on,wait=off`, '--monitor', 'chardev=qmp',
      '--blockdev', `file,node-name=file,filename=${backing},cache.no-flush=on`, ...nodes,
      '--export', `fuse,id=disk,node-name=${top},mountpoint=${served},writable=on`], { stdio: 'ignore' })
    stack.defer(() => endOf(daemon))
    const monitor = await until('the storage daemon answers', 15_000, () => Monitor.open(qmp).catch(() => undefined))
    stack.defer(async () => {
      await monitor.run('quit').catch(() => undefined)
      monitor.close()
    })
    const loop = (await tool('losetup', ['--find', '--show', served])).stdout.trim()
    stack.defer(async () => void (await tool('losetup', ['-d', loop])))
    return new FuseDisk(loop, monitor, stack.move())
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync()
  }
}

const endOf = async (child: ChildProcess): Promise<void> => {
  if (child.exitCode !== null || child.signalCode !== null) return
  const ended = once(child, 'exit')
  const timer = setTimeout(() => child.kill('SIGKILL'), 5_000)
  await ended
  clearTimeout(timer)
}
