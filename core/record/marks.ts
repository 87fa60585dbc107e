import { CdpError } from '../errors/index.ts'

/** A disk of a VM: its number in records, Proxmox's key ("scsi0") and its size. `joining`: it is being copied for the first time, and is no part of a checkpoint yet. */
export type DiskEntry = { disk: number; key: string; sizeBytes: number; joining?: true }

export type CheckpointKind = 'automatic' | 'tagged' | 'quiesced'

/** JSON of a `checkpoint` record. `vms` are the site VM ids whose journals must all hold it. */
export type CheckpointMark = { id: string; vpg: string; vms: string[]; atUnixMs: number; kind: CheckpointKind; tag?: string }
/** JSON of an `epoch` record: why this attach began, and the disks from here on. */
export type EpochMark = { reason: string; disks: DiskEntry[]; config?: string }
/** initial: first copy. bitmap: what QEMU's dirty bitmap says. delta: what differs by hash, of everything. full: everything again; only for an agent that cannot compare. */
export type SyncKind = 'initial' | 'bitmap' | 'full' | 'delta'
/** JSON of a `syncBegin` record. `before`: what the newest checkpoint before it is called, if the sync changes anything. */
export type SyncMark = { kind: SyncKind; reason: string; before?: string }
/** JSON of a `syncEnd` record. `sentBytes`, of a delta sync: what it had to copy. */
export type SyncEndMark = { kind: SyncKind; sentBytes?: number }
/**
 * JSON of a `proof` record: QEMU's written bytes against the captured ones, per disk key, since the attach. `fromSeq`: that attach began with the
 * record of this number; what was captured before, though in the same epoch, is not proved by it.
 */
export type ProofMark = { ok: boolean; atUnixMs: number; fromSeq?: number; disks: Record<string, { writtenBytes: number; capturedBytes: number }> }

const isObject = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null && !Array.isArray(value)

/** @throws CdpError FORMAT */
export const parseCheckpointMark = (json: unknown): CheckpointMark => {
  if (
    !isObject(json) || typeof json.id !== 'string' || typeof json.vpg !== 'string' || typeof json.atUnixMs !== 'number' ||
    !Array.isArray(json.vms) || !json.vms.every((vm) => typeof vm === 'string') ||
    (json.kind !== 'automatic' && json.kind !== 'tagged' && json.kind !== 'quiesced') ||
    (json.tag !== undefined && typeof json.tag !== 'string')
  ) {
    throw new CdpError('FORMAT', 'checkpoint record with unexpected JSON')
  }
  return json as CheckpointMark
}

/** @throws CdpError FORMAT */
export const parseEpochMark = (json: unknown): EpochMark => {
  const isDisk = (disk: unknown): boolean => isObject(disk) && typeof disk.disk === 'number' && typeof disk.key === 'string' && typeof disk.sizeBytes === 'number'
  if (!isObject(json) || typeof json.reason !== 'string' || !Array.isArray(json.disks) || !json.disks.every(isDisk)) {
    throw new CdpError('FORMAT', 'epoch record with unexpected JSON')
  }
  return json as EpochMark
}
