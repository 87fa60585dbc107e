import type { SyncKind } from '../../core/record/index.ts'

/**
 * What a protected VM is doing, each with its reason. `because`: why capture is to be attached and a sync to run, where `why` tells
 * only how the last try of that failed.
 */
export type VmState =
  | { is: 'detached'; why: string; because?: string; sinceUnixMs: number }
  | { is: 'attaching'; why: string; sinceUnixMs: number }
  | { is: 'syncing'; kind: SyncKind; why: string; doneBytes: number; totalBytes: number; /** Of what was compared or copied. */ sentBytes?: number; sinceUnixMs: number }
  | { is: 'streaming'; why: string; joining?: Joining; sinceUnixMs: number }
  /** Bitmap only: QEMU remembers what is written, nothing is captured. `rounds`: but for incremental rounds, under a backup. */
  | { is: 'tracking'; why: string; because?: string; rounds?: { count: number; lastUnixMs?: number }; sinceUnixMs: number }
  /** Somebody wants capture out of QEMU for a while; `inStep`: it was streaming, so that the same stream can go on. */
  | { is: 'suspended'; why: string; because: string; inStep: boolean; sinceUnixMs: number }
  /** The recovery site has taken the group over: nothing of ours stays in QEMU, and nothing is attached any more. */
  | { is: 'fenced'; why: string; sinceUnixMs: number }

/** Disks that are copied for the first time while checkpoints of the others are cut. `failed`: why the last try did not come to its end. */
export type Joining = { keys: readonly string[]; doneBytes: number; totalBytes: number; failed?: string }

export type VmEvent =
  /** `why`: what is known of it beyond that it runs; `held`: capture is held suspended, and why. */
  | { on: 'vmStarted'; why?: string; held?: string }
  | { on: 'vmStopped' }
  /** Time to try again after something went wrong. */
  | { on: 'retry' }
  | { on: 'attachFailed'; why: string; bitmapRecords: boolean }
  /** A backup is in the way; until its end incremental rounds are made. */
  | { on: 'roundsBegan'; why: string }
  /** A round is durable: the VM can be recovered as it was then. */
  | { on: 'roundDone'; atUnixMs: number }
  /** Nothing is in the way any more. */
  | { on: 'roundsOver' }
  | { on: 'roundsFailed'; why: string }
  | { on: 'syncBegan'; kind: SyncKind; why: string; totalBytes: number }
  | { on: 'syncAdvanced'; doneBytes: number; totalBytes: number; sentBytes?: number }
  /** Somebody wants everything compared again, of a VM that is in step. */
  | { on: 'syncForced'; why: string }
  | { on: 'syncFailed'; why: string }
  | { on: 'inStep'; why: string }
  /** A first copy beside checkpoints has come so far; absent: none runs any more. */
  | { on: 'joining'; joining: Joining | undefined }
  /** Attached, and the agent has all that was written before: no sync is needed. */
  | { on: 'nothingMissed'; why: string }
  /** QEMU's connection is gone, the worker let go or ended. */
  | { on: 'captureLost'; why: string }
  /** What is captured is not what the VM has: a disk came, went or grew. */
  | { on: 'disksChanged'; why: string }
  /** `running`: there is a QEMU to take capture out of. */
  | { on: 'suspend'; why: string; running: boolean }
  /** Capture is held suspended and could not be taken out. */
  | { on: 'takeOutFailed' }
  /** The same, and nobody holds it suspended any more. */
  | { on: 'suspendFailed'; why: string }
  | { on: 'resume' }
  /** The group was taken over by the recovery site. */
  | { on: 'fenced'; why: string }
  /** Something of ours may still be in QEMU. */
  | { on: 'removeFailed' }
  | { on: 'stop'; why: string }

export type VmEffect =
  /** `sameStream`: capture was in step and was only suspended. */
  | { do: 'attach'; why: string; sameStream?: boolean }
  | { do: 'compareAll'; why: string }
  /** Take capture out of QEMU, the jobs in peace; bitmaps stay. */
  | { do: 'takeOut' }
  /** Take what is left of capture out of QEMU; bitmaps stay. */
  | { do: 'cleanUp' }
  /** Take all of capture out of QEMU, the jobs in peace, bitmaps too, and end the worker. */
  | { do: 'remove' }
  | { do: 'retryLater' }
  /** A retry that was planned makes no sense any more. */
  | { do: 'forgetRetry' }

export type Transition = { state: VmState; effects: VmEffect[] }

/** The life of a protected VM. Pure; the runner performs effects in order and feeds back events. */
export const next = (state: VmState, event: VmEvent, nowUnixMs: number): Transition => {
  const to = (changed: VmState, ...effects: VmEffect[]): Transition => ({ state: changed, effects })
  const stay: Transition = { state, effects: [] }
  const capturing = state.is === 'attaching' || state.is === 'syncing' || state.is === 'streaming'
  if (state.is === 'fenced') return whileFenced(state, event, nowUnixMs)
  const inRounds = state.is === 'tracking' && state.rounds !== undefined
  switch (event.on) {
    // Another QEMU process: whatever was under way belonged to the one before.
    case 'vmStarted': {
      const why = event.why ?? 'the VM runs'
      if (event.held !== undefined) return to({ is: 'suspended', why: event.held, because: why, inStep: false, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, { do: 'takeOut' })
      return to({ is: 'attaching', why, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, { do: 'attach', why })
    }
    case 'retry': {
      if (state.is === 'suspended') return { state, effects: [{ do: 'takeOut' }] }
      if ((state.is !== 'tracking' && state.is !== 'detached') || inRounds) return stay
      const why = state.because ?? state.why
      return to({ is: 'attaching', why, sinceUnixMs: nowUnixMs }, { do: 'attach', why })
    }
    case 'vmStopped':
      return to({ is: 'detached', why: 'the VM does not run', sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, ...(capturing || inRounds ? [{ do: 'cleanUp' } as const] : []))
    case 'attachFailed':
      return state.is !== 'attaching' ? stay : to({ is: event.bitmapRecords ? 'tracking' : 'detached', why: event.why, because: state.why, sinceUnixMs: nowUnixMs }, { do: 'retryLater' })
    case 'roundsBegan':
      return state.is !== 'attaching' ? stay : to({ is: 'tracking', why: event.why, because: state.why, rounds: { count: 0 }, sinceUnixMs: nowUnixMs })
    case 'roundDone':
      return state.is !== 'tracking' || state.rounds === undefined ? stay : to({ ...state, rounds: { count: state.rounds.count + 1, lastUnixMs: event.atUnixMs } })
    case 'roundsOver': {
      if (state.is !== 'tracking' || !inRounds) return stay
      const why = state.because ?? state.why
      return to({ is: 'attaching', why, sinceUnixMs: nowUnixMs }, { do: 'attach', why })
    }
    case 'roundsFailed':
      return state.is !== 'tracking' || !inRounds ? stay : to({ is: 'tracking', why: event.why, ...(state.because === undefined ? {} : { because: state.because }), sinceUnixMs: nowUnixMs }, { do: 'retryLater' })
    case 'syncBegan':
      return state.is !== 'attaching' ? stay : to({ is: 'syncing', kind: event.kind, why: event.why, doneBytes: 0, totalBytes: event.totalBytes, sinceUnixMs: nowUnixMs })
    case 'syncAdvanced':
      return state.is !== 'syncing' ? stay : to({ ...state, doneBytes: event.doneBytes, totalBytes: event.totalBytes, ...(event.sentBytes === undefined ? {} : { sentBytes: event.sentBytes }) })
    case 'syncForced':
      return state.is !== 'streaming' ? stay : to({ is: 'syncing', kind: 'delta', why: event.why, doneBytes: 0, totalBytes: 0, sinceUnixMs: nowUnixMs }, { do: 'compareAll', why: event.why })
    case 'inStep':
      return state.is !== 'syncing' ? stay : to({ is: 'streaming', why: event.why, sinceUnixMs: nowUnixMs })
    case 'joining': {
      if (state.is !== 'streaming') return stay
      const { is, why, sinceUnixMs } = state
      return to({ is, why, ...(event.joining === undefined ? {} : { joining: event.joining }), sinceUnixMs })
    }
    case 'nothingMissed':
      return state.is !== 'attaching' ? stay : to({ is: 'streaming', why: event.why, sinceUnixMs: nowUnixMs })
    case 'syncFailed':
    case 'captureLost':
      return !capturing ? stay : to({ is: 'tracking', why: event.why, sinceUnixMs: nowUnixMs }, { do: 'cleanUp' }, { do: 'retryLater' })
    case 'disksChanged':
      return !capturing ? stay : to({ is: 'attaching', why: event.why, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, { do: 'attach', why: event.why })
    case 'suspend': {
      // Whoever asks is told when nothing is in QEMU any more: also if it was so before, and if what was tried before failed.
      if (state.is === 'suspended') return to({ ...state, why: event.why }, ...(event.running ? [{ do: 'takeOut' } as const] : []))
      if (!event.running) return stay
      const inStep = state.is === 'streaming'
      const because = inStep ? `suspended, ${event.why}` : 'because' in state && state.because !== undefined ? state.because : state.why
      return to({ is: 'suspended', why: event.why, because, inStep, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, { do: 'takeOut' })
    }
    case 'takeOutFailed':
      return state.is !== 'suspended' ? stay : to(state, { do: 'retryLater' })
    case 'suspendFailed':
      return state.is !== 'suspended' ? stay : to({ is: 'tracking', why: event.why, because: state.because, sinceUnixMs: nowUnixMs }, { do: 'cleanUp' }, { do: 'retryLater' })
    case 'resume': {
      if (state.is !== 'suspended') return stay
      const { because: why, inStep: sameStream } = state
      return to({ is: 'attaching', why, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, { do: 'attach', why, sameStream })
    }
    case 'fenced':
      return to({ is: 'fenced', why: event.why, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, { do: 'remove' })
    case 'removeFailed':
      return stay
    case 'stop':
      return to({ is: 'detached', why: event.why, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' })
  }
}

/** Only the end of protection leads out of it. A QEMU that is met may hold what an earlier life of the plugin left. */
const whileFenced = (state: Extract<VmState, { is: 'fenced' }>, event: VmEvent, nowUnixMs: number): Transition => {
  switch (event.on) {
    case 'vmStarted':
      return { state, effects: [{ do: 'forgetRetry' }, { do: 'remove' }] }
    case 'retry':
      return { state, effects: [{ do: 'remove' }] }
    case 'removeFailed':
      return { state, effects: [{ do: 'retryLater' }] }
    case 'vmStopped':
      return { state, effects: [{ do: 'forgetRetry' }] }
    case 'stop':
      return { state: { is: 'detached', why: event.why, sinceUnixMs: nowUnixMs }, effects: [{ do: 'forgetRetry' }] }
    default:
      return { state, effects: [] }
  }
}
