import type { SyncKind } from '../../core/record/index.ts'

/**
 * What a protected VM is doing, each with its reason. `because`: why capture is to be attached and a sync to run, where `why` tells
 * only how the last try of that failed.
 */
export type VmState =
  | { is: 'detached'; why: string; because?: string; sinceUnixMs: number }
  | { is: 'attaching'; why: string; sinceUnixMs: number }
  | { is: 'syncing'; kind: SyncKind; why: string; doneBytes: number; totalBytes: number; sinceUnixMs: number }
  | { is: 'streaming'; why: string; sinceUnixMs: number }
  /** Bitmap only: QEMU remembers what is written, nothing is captured. */
  | { is: 'tracking'; why: string; because?: string; sinceUnixMs: number }

export type VmEvent =
  /** `why`: what is known of it beyond that it runs. */
  | { on: 'vmStarted'; why?: string }
  | { on: 'vmStopped' }
  /** Time to try again after something went wrong. */
  | { on: 'retry' }
  | { on: 'attachFailed'; why: string; bitmapRecords: boolean }
  | { on: 'syncBegan'; kind: SyncKind; why: string; totalBytes: number }
  | { on: 'syncAdvanced'; doneBytes: number; totalBytes: number }
  | { on: 'syncFailed'; why: string }
  | { on: 'inStep'; why: string }
  /** QEMU's connection is gone, the worker let go or ended. */
  | { on: 'captureLost'; why: string }
  | { on: 'stop'; why: string }

export type VmEffect =
  | { do: 'attach'; why: string }
  /** Take what is left of capture out of QEMU; bitmaps stay. */
  | { do: 'cleanUp' }
  | { do: 'retryLater' }
  /** A retry that was planned makes no sense any more. */
  | { do: 'forgetRetry' }

export type Transition = { state: VmState; effects: VmEffect[] }

/** The life of a protected VM. Pure; the runner performs effects in order and feeds back events. */
export const next = (state: VmState, event: VmEvent, nowUnixMs: number): Transition => {
  const to = (changed: VmState, ...effects: VmEffect[]): Transition => ({ state: changed, effects })
  const stay: Transition = { state, effects: [] }
  const capturing = state.is === 'attaching' || state.is === 'syncing' || state.is === 'streaming'
  switch (event.on) {
    // Another QEMU process: whatever was under way belonged to the one before.
    case 'vmStarted': {
      const why = event.why ?? 'the VM runs'
      return to({ is: 'attaching', why, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, { do: 'attach', why })
    }
    case 'retry': {
      if (state.is !== 'tracking' && state.is !== 'detached') return stay
      const why = state.because ?? state.why
      return to({ is: 'attaching', why, sinceUnixMs: nowUnixMs }, { do: 'attach', why })
    }
    case 'vmStopped':
      return to({ is: 'detached', why: 'the VM does not run', sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' }, ...(capturing ? [{ do: 'cleanUp' } as const] : []))
    case 'attachFailed':
      return state.is !== 'attaching' ? stay : to({ is: event.bitmapRecords ? 'tracking' : 'detached', why: event.why, because: state.why, sinceUnixMs: nowUnixMs }, { do: 'retryLater' })
    case 'syncBegan':
      return state.is !== 'attaching' ? stay : to({ is: 'syncing', kind: event.kind, why: event.why, doneBytes: 0, totalBytes: event.totalBytes, sinceUnixMs: nowUnixMs })
    case 'syncAdvanced':
      return state.is !== 'syncing' ? stay : to({ ...state, doneBytes: event.doneBytes, totalBytes: event.totalBytes })
    case 'inStep':
      return state.is !== 'syncing' ? stay : to({ is: 'streaming', why: event.why, sinceUnixMs: nowUnixMs })
    case 'syncFailed':
    case 'captureLost':
      return !capturing ? stay : to({ is: 'tracking', why: event.why, sinceUnixMs: nowUnixMs }, { do: 'cleanUp' }, { do: 'retryLater' })
    case 'stop':
      return to({ is: 'detached', why: event.why, sinceUnixMs: nowUnixMs }, { do: 'forgetRetry' })
  }
}
