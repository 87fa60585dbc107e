import { setTimeout as delay } from 'node:timers/promises'
import type { Figure } from './figure.ts'
import { BUDGET_BYTES, mib } from './rig/budget.ts'
import type { PathRig } from './rig/path-rig.ts'
import { peakResidentBytesOf } from './rig/proc.ts'

/** Capture tells its figures once a second. */
const STATS_EVERY_MS = 1100

/**
 * Peak of the captured data in memory with the default budget, at full load, and while the agent is stopped: capture may let go,
 * its memory may not grow.
 */
export const measureMemory = async (rig: PathRig, { quick, say }: { quick: boolean; say: (line: string) => void }): Promise<Figure> => {
  const seconds = quick ? 1 : 10
  const residentBefore = peakResidentBytesOf(rig.plugin.pid)
  const phases: { what: string; peakBytes: number; letGo: boolean }[] = []
  for (const [vm, what, depth, blockBytes] of [['301', 'full load, 4 KiB', 32, 4096], ['302', 'full load, 1 MiB', 4, 2 ** 20], ['303', 'agent stopped', 32, 4096]] as const) {
    await rig.capture(vm, BUDGET_BYTES)
    await rig.captured(vm, async () => {
      if (what === 'agent stopped') rig.agent.signal('SIGSTOP')
      try {
        await rig.load({ rw: blockBytes === 4096 ? 'randwrite' : 'write', blockBytes, depth, seconds })
        await delay(STATS_EVERY_MS)
      } finally {
        rig.agent.signal('SIGCONT')
      }
    })
    const { letGo, peakBytes } = rig.plugin.news(vm)
    await rig.plugin.release(vm)
    phases.push({ what, peakBytes, letGo: letGo.length > 0 })
    say(`memory.plugin.peak, ${what}: ${mib(peakBytes)} MiB held${letGo.length > 0 ? `, then capture let go: ${letGo[0]}` : ''}`)
  }
  const value = Math.max(...phases.map(({ peakBytes }) => peakBytes)) / 2 ** 20
  const reference = BUDGET_BYTES / 2 ** 20
  const note = phases.map(({ what, peakBytes, letGo }) => `${what} ${mib(peakBytes)}${letGo ? ' (let go)' : ''}`).join(', ')
  return {
    name: 'memory.plugin.peak', value, unit: 'MiB', reference, ratio: reference / value, against: 'the budget', ...(quick ? { reduced: true } : {}),
    note: `${note}; process at most ${mib(peakResidentBytesOf(rig.plugin.pid))} MiB resident, ${mib(residentBefore)} before the load`,
  }
}
