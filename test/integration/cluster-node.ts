import { mkdir, rename, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { silentLogger } from '../../core/log/index.ts'
import { GroupClock } from '../../plugin/capture/index.ts'
import { ProtectedVm } from '../../plugin/protect/protected-vm.ts'
import type { VmState } from '../../plugin/protect/vm-state.ts'
import type { BareVm } from './bare-vm.ts'
import { VM_ID } from './protected-site.ts'
import { fenceOf } from './protected-site.ts'
import type { ProtectedSite } from './protected-site.ts'

/** A node of the protected cluster with a plugin of its own, of which only what protects one VM is there: its files, its state, its sockets. */
export class ClusterNode implements AsyncDisposable {
  readonly changes: VmState[] = []
  readonly #site: ProtectedSite
  readonly #dir: string
  #vm: ProtectedVm | undefined
  #waiters: (() => void)[] = []

  private constructor(site: ProtectedSite, dir: string) {
    this.#site = site
    this.#dir = dir
  }

  static async make(site: ProtectedSite, name: string): Promise<ClusterNode> {
    const dir = join(site.dir, name)
    for (const part of ['run', 'pve/qemu-server', 'state', 'sockets']) await mkdir(join(dir, part), { recursive: true })
    return new ClusterNode(site, dir)
  }

  get vm(): ProtectedVm {
    if (this.#vm === undefined) throw new Error('the VM is not on this node')
    return this.#vm
  }

  get state(): VmState {
    return this.vm.state
  }

  /** Kinds of the syncs that ran here, each with its reason. */
  get syncs(): string[] {
    return this.changes.flatMap((state) => (state.is === 'syncing' ? [`${state.kind}: ${state.why}`] : []))
  }

  /** As Proxmox lays it out: this QEMU is VM 100 here. */
  async runs(vm: BareVm): Promise<void> {
    await rm(join(this.#dir, `run/${VM_ID}.qmp`), { force: true })
    await symlink(vm.qmpPath, join(this.#dir, `run/${VM_ID}.qmp`))
    await writeFile(join(this.#dir, `run/${VM_ID}.pid`), `${vm.pid}\n`)
  }

  /** Writes the VM's configuration here, as Proxmox does: a lock stands in it. */
  async configure(lock?: 'migrate' | 'backup'): Promise<void> {
    await writeFile(`${this.#config}.tmp`, `${lock === undefined ? '' : `lock: ${lock}\n`}name: bare\nscsi0: store:vm-100-disk-0,size=64M\n\n[before]\nlock: migrate\n`)
    await rename(`${this.#config}.tmp`, this.#config)
  }

  /** The configuration moves, with the lock in it. */
  async moveTo(other: ClusterNode): Promise<void> {
    await rename(this.#config, other.#config)
  }

  /** What a group does when the VM is on this node. */
  protect(arrived: boolean): void {
    const options = this.#site.vmOptions
    const settings = { ...options.settings, paths: { qemuServerDirectory: join(this.#dir, 'run'), pveDirectory: join(this.#dir, 'pve') }, stateDirectory: join(this.#dir, 'state'), runDirectory: join(this.#dir, 'sockets') }
    this.#vm = new ProtectedVm({
      ...options, arrived, groupClock: new GroupClock().buffer, log: silentLogger, onNews: () => undefined, settings, fence: fenceOf({ vpg: options.vpg, settings }),
      onChange: (_id, state) => {
        this.changes.push(state)
        for (const wake of this.#waiters.splice(0)) wake()
      },
    })
    this.#vm.start()
  }

  /** What a group does when the VM has left. */
  async letGo(): Promise<void> {
    await this.#vm?.stop(true)
    this.#vm = undefined
  }

  async until(done: (state: VmState) => boolean): Promise<VmState> {
    while (!done(this.state)) await new Promise<void>((resolve) => this.#waiters.push(resolve))
    return this.state
  }

  untilStreaming(): Promise<VmState> {
    return this.until(({ is }) => is === 'streaming')
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.letGo()
  }

  get #config(): string {
    return join(this.#dir, `pve/qemu-server/${VM_ID}.conf`)
  }
}
