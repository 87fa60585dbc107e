import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Catalogue } from '../../agent/checkpoint/index.ts'
import { MirrorStorage, chooseMirror } from '../../agent/mirror/index.ts'
import { HashDesk } from '../../agent/hashes/index.ts'
import { GroupGenerations, Ingest, VmRegistry } from '../../agent/ingest/index.ts'
import type { SegmentSealer } from '../../agent/journal/index.ts'
import { PinRegistry } from '../../agent/recovery/index.ts'
import { listenSecure } from '../../core/link/index.ts'
import type { SecureListener } from '../../core/link/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { createAuthority, createKeyPair, issueCertificate } from '../../core/pki/index.ts'
import type { TlsIdentity } from '../../core/pki/index.ts'
import { GroupClock } from '../../plugin/capture/index.ts'
import { GroupFence } from '../../plugin/protect/group-fence.ts'
import { ProtectedVm } from '../../plugin/protect/protected-vm.ts'
import type { BareVm } from './bare-vm.ts'

// One protected VM and a real agent, both in this process: for tests with real QEMU processes.

const MiB = 1024 * 1024
export const VM_ID = 100

type Identities = { server: TlsIdentity; client: TlsIdentity }
export const makeIdentities = async (): Promise<Identities> => {
  const authority = await createAuthority({ name: 'test' })
  const identity = async (usage: 'server' | 'client', commonName: string): Promise<TlsIdentity> => {
    const keyPair = await createKeyPair()
    const certificatePem = await issueCertificate(authority, { commonName, publicKeyPem: keyPair.publicKeyPem, usage, validForMs: 86_400_000 })
    return { certificatePem, privateKeyPem: keyPair.privateKeyPem, authorityPem: authority.certificatePem }
  }
  return { server: await identity('server', 'recovery'), client: await identity('client', 'site-a') }
}

export type ProtectedSiteOptions = Identities & { sealer: SegmentSealer; syncRateBytesPerSec?: number; verifyRateBytesPerSec?: number; rotateEveryMs?: number; mirrors?: 'file' | 'qcow2' }

export class ProtectedSite implements AsyncDisposable {
  readonly changes: string[] = []
  /** Why it was in each of those states. */
  readonly whys: string[] = []
  /** Where each verify found differences. */
  readonly verified: string[] = []
  /** NBD servers that run in QEMU already, by VM id. */
  readonly existingNbdServers: Record<string, string> = {}
  readonly dir: string
  readonly registry: VmRegistry
  readonly catalogue: Catalogue
  readonly vm: ProtectedVm
  #listener: SecureListener
  readonly ingest: Ingest
  readonly #hashes: HashDesk
  #waiters: (() => void)[] = []

  private constructor(dir: string, listener: SecureListener, registry: VmRegistry, catalogue: Catalogue, ingest: Ingest, hashes: HashDesk, vm: (site: ProtectedSite) => ProtectedVm) {
    this.dir = dir
    this.registry = registry
    this.catalogue = catalogue
    this.#listener = listener
    this.ingest = ingest
    this.#hashes = hashes
    this.vm = vm(this)
  }

  static async start(options: ProtectedSiteOptions): Promise<ProtectedSite> {
    const dir = await mkdtemp('/tmp/cdp-')
    for (const name of ['run', 'pve', 'state', 'sockets']) await mkdir(join(dir, name))
    const { sealer, server, client } = options
    const catalogue = new Catalogue(':memory:')
    const hashes = new HashDesk({ pins: new PinRegistry() })
    const mirrorsOf = (vmDirectory: string): MirrorStorage =>
      new MirrorStorage({ vmDirectory, choose: (disk) => chooseMirror({ default: { kind: options.mirrors ?? 'file' }, vms: {} }, vmDirectory, disk) })
    const registry = new VmRegistry({ directory: join(dir, 'vms'), catalogue, sealer, mirrorsOf, log: silentLogger, clock: { nowUnixMs: Date.now }, onValid: () => undefined })
    const ingest = new Ingest({ registry, catalogue, generations: new GroupGenerations(join(dir, 'generations'), Date.now), log: silentLogger, hashes })
    const listener = await listenSecure({ host: '127.0.0.1', port: 0, tls: server, log: silentLogger, onStream: (socket, peer) => ingest.take(socket, peer.siteId), onPair: (socket) => void socket.destroy() })
    return new ProtectedSite(dir, listener, registry, catalogue, ingest, hashes, (self) => new ProtectedVm({
      vmId: VM_ID, vpg: 'shop', vms: [String(VM_ID)], groupClock: new GroupClock().buffer, log: silentLogger,
      fence: new GroupFence({ stateDirectory: join(dir, 'state'), vpg: 'shop', log: silentLogger, nowUnixMs: Date.now }), agent: { host: '127.0.0.1', port: listener.port, tls: client },
      settings: {
        paths: { qemuServerDirectory: join(dir, 'run'), pveDirectory: join(dir, 'pve') }, stateDirectory: join(dir, 'state'), runDirectory: join(dir, 'sockets'), memoryBytesPerVm: 16 * MiB, lingerMs: 5,
        syncRateBytesPerSec: options.syncRateBytesPerSec ?? 0, verify: { everyMs: 0, rateBytesPerSec: options.verifyRateBytesPerSec ?? 0 }, proofEveryMs: 1000, rotateEveryMs: options.rotateEveryMs ?? 3_600_000, slowAck: { p99Ms: 5000, maxMs: 5000 }, existingNbdServers: self.existingNbdServers,
      },
      onChange: (_id, state) => {
        self.changes.push(state.is)
        self.whys.push(state.why)
        self.noted()
      },
      onVerified: (_id, _report, where) => {
        self.verified.push(where)
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
    this.ingest[Symbol.dispose]()
    await this.#hashes[Symbol.asyncDispose]()
    await this.registry[Symbol.asyncDispose]()
    this.catalogue[Symbol.dispose]()
    await rm(this.dir, { recursive: true, force: true })
  }
}
