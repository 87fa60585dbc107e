import type { CaptureEvent, CaptureWorker } from '../../plugin/capture/index.ts'
import type { Pairing } from '../../plugin/pairing/index.ts'

// What the bench and its plugin process say to each other.

export type StartCapture = { vm: string; vpg: string; targetPath: string; sizeBytes: number; budgetBytes: number; pairing: Pairing }
type AskName = Parameters<CaptureWorker['ask']>[0]

export type PluginRequest =
  | { do: 'start'; with: StartCapture }
  | { do: 'stop'; vm: string }
  | { do: 'ask'; vm: string; name: AskName; ask: unknown }
  /** A checkpoint at once; answers with its id when it is valid at the agent. */
  | { do: 'checkpoint'; vm: string }
  | { do: 'beginCheckpoints'; vm: string; everyMs: number; sampleEveryMs: number }
  | { do: 'endCheckpoints' }

/** Ages of the newest valid checkpoint at each sample, and for each checkpoint the time from its cut to the news that it is valid everywhere. */
export type CheckpointSamples = { rpoMs: number[]; lagMs: number[]; abandoned: number }

export type ToPlugin = PluginRequest & { id: number }
export type FromPlugin = { id: number; answer: unknown } | { id: number; error: string } | { vm: string; event: CaptureEvent } | { ready: true }
