import type { ClientTls } from '../../core/pki/index.ts'
import type { CheckpointMark, DiskEntry, EpochMark, ProofMark, SyncKind } from '../../core/record/index.ts'
import type { StateNews, Welcome } from '../../core/stream/index.ts'
import type { SyncDisk } from '../sync/index.ts'
import type { AckLatency } from './ack-meter.ts'

// What the main thread and a capture worker say to each other. Requests carry an id and get exactly one answer.

/** Given to a worker when it starts. */
export type CaptureWorkerData = {
  vm: string
  vpg: string
  vms: string[]
  /** Unix socket that QEMU's mirror jobs connect to. */
  targetPath: string
  disks: DiskEntry[]
  agent: { host: string; port: number; tls: ClientTls }
  groupClock: SharedArrayBuffer
  heartbeat: SharedArrayBuffer
  /** Memory for frames that are not durable at the agent. */
  budgetBytes: number
  lingerMs: number
  /** Beyond these, capture lets go: the guest must not wait. */
  slowAck: { p99Ms: number; maxMs: number }
}

export type CaptureRequests = {
  /** Connects to the agent as a new attach; everything captured from here on gets its place after `durableSeq`. */
  open: { ask: { reason: string; epoch: Omit<EpochMark, 'disks'> }; answer: Welcome & { /** Less is durable there than it had acknowledged to this worker. */ agentLostData: boolean } }
  /** Copies disks; resolves when the sync's end is recorded. */
  sync: { ask: { kind: SyncKind; reason: string; exportSocketPath: string; disks: (SyncDisk & { exportName: string; totalBytes: number })[]; rateBytesPerSec: number }; answer: { lastSeq: number } }
  /** Group cut on one node: everything stamped with E <= c. */
  cut: { ask: { c: number; mark: CheckpointMark }; answer: { namedSeq: number } | { refused: string } }
  /** First phase of a group cut over several nodes: hold acknowledgements, at most so long. */
  hold: { ask: { cutId: string; holdMs: number }; answer: { namedSeq: number } | { refused: string } }
  /** Second phase: the marker names what `hold` answered; refused if that cut's hold has lapsed, whatever else is held meanwhile. */
  commit: { ask: { cutId: string; mark: CheckpointMark }; answer: { namedSeq: number } | { refused: string } }
  /** Ends the hold of that cut, if it is on. */
  release: { ask: { cutId: string }; answer: object }
  /** The comparison speaks of everything up to `upToSeq`; without it, up to now. */
  proof: { ask: { mark: ProofMark; upToSeq?: number }; answer: object }
  /** The captured bytes per disk key and the newest sequence, as of now. */
  captured: { ask: object; answer: { seq: number; bytes: Record<string, number> } }
  /** Nothing that was copied so far counts any more: the next copy begins at offset 0 of every disk. */
  restartCopy: { ask: object; answer: { lastSeq: number } }
  /** Ends connections from QEMU; frames that wait go on to the agent. */
  letGo: { ask: { why: string }; answer: object }
  /** Waits until everything recorded is durable, or rejects at the deadline; then says a clean end to the agent. */
  end: { ask: { deadlineMs: number }; answer: { durableSeq: number } }
}
export type CaptureRequestName = keyof CaptureRequests

export type CaptureStats = {
  receivedSeq: number
  durableSeq: number
  heldBytes: number
  peakBytes: number
  linkUp: boolean
  ack: AckLatency
  /** How late the worker's event loop ran at worst. */
  loopLateMs: number
}

export type CaptureEvent =
  | { is: 'target'; key: string; state: 'opened' | 'closed'; clean: boolean; why: string }
  | { is: 'link'; up: boolean; why: string }
  /** The worker ended QEMU's connections itself: bitmap only from here on. */
  | { is: 'letGo'; why: string }
  | { is: 'sync'; doneBytes: number; totalBytes: number }
  | { is: 'news'; news: StateNews }
  | { is: 'stats'; stats: CaptureStats }

export type ToWorker = { [Name in CaptureRequestName]: { id: number; name: Name; ask: CaptureRequests[Name]['ask'] } }[CaptureRequestName]
export type FromWorker = { id: number; answer: unknown } | { id: number; error: { code: string; message: string; hint?: string } } | { event: CaptureEvent } | { listening: true }
