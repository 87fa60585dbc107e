import type { ClientTls } from '../../core/pki/index.ts'
import type { CheckpointMark, DiskEntry, EpochMark, ProofMark, SyncKind } from '../../core/record/index.ts'
import type { GenerationVerdict, StateNews, Welcome } from '../../core/stream/index.ts'
import type { SpillOptions } from '../buffer/index.ts'
import type { DiskRange, SyncDisk, VerifyDisk, VerifyVerdict } from '../sync/index.ts'
import type { AckLatency } from './ack-meter.ts'

// What the main thread and a capture worker say to each other. Requests carry an id and get exactly one answer.

/** Given to a worker when it starts. */
export type CaptureWorkerData = {
  vm: string
  vpg: string
  vms: string[]
  /** In which this site has the group; the first one if it is absent. */
  generation?: number
  /** Unix socket that QEMU's mirror jobs connect to. */
  targetPath: string
  disks: DiskEntry[]
  agent: { host: string; port: number; tls: ClientTls }
  groupClock: SharedArrayBuffer
  heartbeat: SharedArrayBuffer
  /** Memory for frames that are not durable at the agent. */
  budgetBytes: number
  /** This VM's share of the line (RateCell of plugin/replicate); without it, no limit. */
  rate?: SharedArrayBuffer
  /** Where memory overflows to; without it, into nothing. */
  spill?: SpillOptions
  lingerMs: number
  /** Beyond these, capture lets go: the guest must not wait. */
  slowAck: { p99Ms: number; maxMs: number }
}

/** What is to be copied, through which read export of QEMU's; a limit of 0: none. */
export type CopyAsk = { exportSocketPath: string; disks: (SyncDisk & { exportName: string; totalBytes: number })[]; rateBytesPerSec: number }

export type CaptureRequests = {
  /** Connects to the agent as a new attach; everything captured from here on gets its place after `durableSeq`. */
  open: { ask: { reason: string; epoch: Omit<EpochMark, 'disks'>; /** Disks that have grown, by key. */ sizes?: Record<string, number> }; answer: Welcome & { /** Less is durable there than it had acknowledged to this worker. */ agentLostData: boolean } }
  /** Everything captured so far goes to the agent; no new attach follows. @throws CdpError UNREACHABLE while the link is down, ABORTED when it is told to let go meanwhile */
  deliver: { ask: object; answer: object }
  /**
   * Capture that was in step begins again in the same epoch and connection, on disks that may have grown. False, and nothing happens, if
   * that stream cannot go on: a new attach has to be opened.
   */
  rejoin: { ask: { epoch: Omit<EpochMark, 'disks'>; sizes: Record<string, number> }; answer: { rejoined: boolean } }
  /** Copies disks; resolves when the sync's end is recorded. */
  sync: { ask: { kind: SyncKind; reason: string; before?: string } & CopyAsk; answer: { lastSeq: number } }
  /**
   * Copies disks that are joining, beside checkpoints of the others; resolves when everything is recorded. A sync that begins, and whatever ends capture, ends it.
   * @throws CdpError CONFLICT unless the others are in step
   */
  join: { ask: CopyAsk; answer: { lastSeq: number } }
  /** Ends such a copy, if one runs, with that reason. */
  endJoin: { ask: { why: string }; answer: object }
  /** The copy of these disks, by number, is durable: from here on they belong to checkpoints. @throws CdpError ABORTED if capture was let go since the copy began */
  joined: { ask: { disks: number[] }; answer: { lastSeq: number } }
  /** Nothing has to be copied: what the agent holds durably is what the disks held when this attach began. */
  inStep: { ask: object; answer: { lastSeq: number } }
  /**
   * A round of an online verify: compares ranges of the disks with what the agent holds. `left` was not looked at, since too many suspects came
   * together: they are judged first. @throws CdpError CONFLICT while a sync runs
   */
  compare: { ask: { exportSocketPath: string; disks: VerifyDisk[]; ranges: DiskRange[]; rateBytesPerSec: number }; answer: { comparedBytes: number; left: DiskRange[]; suspects: number } }
  /** The verdict on the round's suspects; only after QEMU was made to drain. */
  judge: { ask: object; answer: VerifyVerdict }
  /** Ends a comparison that is under way, with that reason. */
  endCompare: { ask: { why: string }; answer: object }
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
  /** Where the stream stands, and when each disk, by key, was written to last or came into step. */
  lastCaptured: { ask: object; answer: { epoch: number; seq: number; atUnixMs: Record<string, number> } }
  /** An incremental round begins: what QEMU writes from here on are copies of its disks. @throws CdpError ABORTED unless a stream was opened */
  beginRound: { ask: { reason: string }; answer: object }
  /** All of a round has arrived: its end is recorded, and the checkpoint that it is. @throws CdpError ABORTED if it has not */
  endRound: { ask: { mark: CheckpointMark }; answer: { lastSeq: number } }
  /** Resolves when everything up to `seq` is durable at the agent; rejects when capture is let go before. */
  durable: { ask: { seq: number }; answer: object }
  /** Nothing that was copied so far counts any more: the next copy begins at offset 0 of every disk. */
  restartCopy: { ask: object; answer: { lastSeq: number } }
  /** Ends connections from QEMU, and an `open` under way; frames that wait go on to the agent. `inPeace`: the connections are left for QEMU to end. No cut is made from here on. */
  letGo: { ask: { why: string; inPeace?: boolean }; answer: object }
  /** Waits until everything recorded is durable, or rejects at the deadline; then says a clean end to the agent. */
  end: { ask: { deadlineMs: number }; answer: { durableSeq: number } }
}
export type CaptureRequestName = keyof CaptureRequests

export type CaptureStats = {
  receivedSeq: number
  durableSeq: number
  heldBytes: number
  peakBytes: number
  /** In files of the spill. */
  spilledBytes: number
  /** Bytes of frames sent to the agent; only grows. */
  sentBytes: number
  linkUp: boolean
  ack: AckLatency
  /** How late the worker's event loop ran at worst. */
  loopLateMs: number
}

/** `superseded`: the recovery site has taken the group over; `ahead`: it has forgotten a handover. `generation`: as that site has the group. */
export type Disowned = { verdict: Exclude<GenerationVerdict, 'current'>; generation: number; message: string; hint?: string }

export type CaptureEvent =
  /** `clean`: QEMU said goodbye, and nothing that it asked for was refused. */
  | { is: 'target'; key: string; state: 'opened' | 'closed'; clean: boolean; why: string; atUnixMs: number }
  | { is: 'link'; up: boolean; why: string }
  /** The worker ended QEMU's connections itself: bitmap only from here on. */
  | { is: 'letGo'; why: string }
  /** `durable`: by disk number, everything below is at the agent durably, with `durableSeq`. */
  | { is: 'sync'; doneBytes: number; totalBytes: number; sentBytes: number; durable?: Record<string, number>; durableSeq: number }
  | ({ is: 'disowned' } & Disowned)
  | { is: 'news'; news: StateNews }
  | { is: 'stats'; stats: CaptureStats }

export type ToWorker = { [Name in CaptureRequestName]: { id: number; name: Name; ask: CaptureRequests[Name]['ask'] } }[CaptureRequestName]
export type FromWorker = { id: number; answer: unknown } | { id: number; error: { code: string; message: string; hint?: string } } | { event: CaptureEvent } | { listening: true }
