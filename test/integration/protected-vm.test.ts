import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals'
import { Catalogue } from '../../agent/checkpoint/index.ts'
import { Ingest, VmRegistry } from '../../agent/ingest/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { listenSecure } from '../../core/link/index.ts'
import type { SecureListener } from '../../core/link/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { createAuthority, createKeyPair, issueCertificate } from '../../core/pki/index.ts'
import type { Authority, TlsIdentity } from '../../core/pki/index.ts'
import { asList } from '../../core/qmp/index.ts'
import { GroupClock } from '../../plugin/capture/index.ts'
import { ProtectedVm } from '../../plugin/protect/protected-vm.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'

// Protection of a VM through its life, with real QEMU processes and a real agent: what must come back by itself, and what must end.

const MiB = 1024 * 1024
const VM_ID = 100
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

let authority: Authority
let server: TlsIdentity
let client: TlsIdentity
const identity = async (usage: 'server' | 'client', commonName: string): Promise<TlsIdentity> => {
  const keyPair = await createKeyPair()
  const certificatePem = await issueCertificate(authority, { commonName, publicKeyPem: keyPair.publicKeyPem, usage, validForMs: 86_400_000 })
  return { certificatePem, privateKeyPem: keyPair.privateKeyPem, authorityPem: authority.certificatePem }
}
beforeAll(async () => {
  authority = await createAuthority({ name: 'test' })
  server = await identity('server', 'recovery')
  client = await identity('client', 'site-a')
})

class Site implements AsyncDisposable {
  readonly changes: string[] = []
  readonly dir: string
  readonly registry: VmRegistry
  readonly #catalogue: Catalogue
  readonly vm: ProtectedVm
  #listener: SecureListener
  #ingest: Ingest
  #waiters: (() => void)[] = []

  private constructor(dir: string, listener: SecureListener, registry: VmRegistry, catalogue: Catalogue, ingest: Ingest, vm: (site: Site) => ProtectedVm) {
    this.dir = dir
    this.registry = registry
    this.#catalogue = catalogue
    this.#listener = listener
    this.#ingest = ingest
    this.vm = vm(this)
  }

  static async start(options: { syncRateBytesPerSec?: number } = {}): Promise<Site> {
    const dir = await mkdtemp('/tmp/cdp-')
    for (const name of ['run', 'pve', 'state', 'sockets']) await mkdir(join(dir, name))
    const catalogue = new Catalogue(':memory:')
    const registry = new VmRegistry({ directory: join(dir, 'vms'), catalogue, sealer, log: silentLogger, clock: { nowUnixMs: Date.now }, onValid: () => undefined })
    const ingest = new Ingest({ registry, catalogue, log: silentLogger })
    const listener = await listenSecure({ host: '127.0.0.1', port: 0, tls: server, log: silentLogger, onStream: (socket, peer) => ingest.take(socket, peer.siteId), onPair: (socket) => void socket.destroy() })
    return new Site(dir, listener, registry, catalogue, ingest, (self) => new ProtectedVm({
      vmId: VM_ID, vpg: 'shop', vms: [String(VM_ID)], groupClock: new GroupClock().buffer, log: silentLogger, agent: { host: '127.0.0.1', port: listener.port, tls: client },
      settings: {
        paths: { qemuServerDirectory: join(dir, 'run'), pveDirectory: join(dir, 'pve') }, stateDirectory: join(dir, 'state'), runDirectory: join(dir, 'sockets'), memoryBytesPerVm: 16 * MiB, lingerMs: 5,
        syncRateBytesPerSec: options.syncRateBytesPerSec ?? 0, proofEveryMs: 1000, slowAck: { p99Ms: 5000, maxMs: 5000 }, existingNbdServers: {},
      },
      onChange: (_id, state) => {
        self.changes.push(state.is)
        self.noted()
      },
      onNews: () => undefined,
    }))
  }

  noted(): void {
    for (const wake of this.#waiters.splice(0)) wake()
  }

  /** As Proxmox lays it out: this QEMU is VM 100 now. */
  async runs(vm: BareVm): Promise<void> {
    await rm(join(this.dir, `run/${VM_ID}.qmp`), { force: true })
    await symlink(vm.qmpPath, join(this.dir, `run/${VM_ID}.qmp`))
    await writeFile(join(this.dir, `run/${VM_ID}.pid`), `${vm.pid}\n`)
  }

  async until(done: () => boolean): Promise<void> {
    while (!done()) await new Promise<void>((resolve) => this.#waiters.push(resolve))
  }

  get state(): string {
    return this.vm.state.is
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.vm.stop(true)
    await this.#listener[Symbol.asyncDispose]()
    this.#ingest[Symbol.dispose]()
    await this.registry[Symbol.asyncDispose]()
    this.#catalogue[Symbol.dispose]()
    await rm(this.dir, { recursive: true, force: true })
  }
}

const jobsOf = (vm: BareVm): Promise<number> => vm.qmp(async (qmp) => asList(await qmp.execute('query-block-jobs'), 'jobs').length)

const shapes: readonly VmShape[] = ['8.4', '9.x']
describe.each(shapes)('a protected VM in the shape of %s', (shape) => {
  test('comes into step; stopped, it waits without trying; started again, it comes into step again', async () => {
    await using site = await Site.start()
    {
      await using vm = await startBareVm({ shape, sizeBytes: 8 * MiB })
      await site.runs(vm)
      site.vm.start()
      await site.until(() => site.state === 'streaming')
      expect(await jobsOf(vm)).toBe(1)
    }
    await site.until(() => site.state === 'detached')
    expect(site.vm.state.why).toBe('the VM does not run')
    // The time in which a retry planned before would come.
    const from = site.changes.length
    await new Promise((resolve) => setTimeout(resolve, 2500))
    expect(site.changes.slice(from)).toEqual([])
    await using vm = await startBareVm({ shape, sizeBytes: 8 * MiB })
    await site.runs(vm)
    await site.until(() => site.state === 'streaming')
    await site.vm.stop(false)
    expect(await jobsOf(vm)).toBe(0)
    expect(existsSync(join(site.dir, `state/vm-${VM_ID}.json`))).toBe(false)
  })

  test('stop in the middle of a long copy does not wait for it, and leaves no job behind', async () => {
    await using site = await Site.start({ syncRateBytesPerSec: MiB })
    await using vm = await startBareVm({ shape, sizeBytes: 32 * MiB })
    await writeFile(vm.disks[0].path, Buffer.alloc(32 * MiB, 5))
    await site.runs(vm)
    site.vm.start()
    await site.until(() => site.state === 'syncing')
    await new Promise((resolve) => setTimeout(resolve, 500))
    const startMs = performance.now()
    await site.vm.stop(true)
    expect(performance.now() - startMs).toBeLessThan(4000)
    expect(await jobsOf(vm)).toBe(0)
    expect(site.vm.state).toMatchObject({ is: 'detached', why: 'protection was ended' })
  })
})
