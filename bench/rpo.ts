import { quantile, type Figure } from './figure.ts'
import { BUDGET_BYTES } from './rig/budget.ts'
import type { PathRig } from './rig/path-rig.ts'

const VM = '201'
const EVERY_MS = 1000
const SAMPLE_EVERY_MS = 10

export type RpoOptions = { quick: boolean; say: (line: string) => void; /** Half of the maximum. */ rateIops: number }

/** Checkpoints each second under load: the age of the newest valid one, sampled, and how long each took from its cut to valid everywhere. */
export const measureRpo = async (rig: PathRig, { quick, say, rateIops }: RpoOptions): Promise<Figure[]> => {
  await rig.capture(VM, BUDGET_BYTES)
  const seconds = quick ? 5 : 30
  const { samples, result } = await rig.captured(VM, async () => {
    await rig.plugin.checkpoint(VM)
    await rig.plugin.beginCheckpoints(VM, EVERY_MS, SAMPLE_EVERY_MS)
    const result = await rig.load({ rw: 'randwrite', blockBytes: 4096, depth: 32, seconds, rateIops })
    return { samples: await rig.plugin.endCheckpoints(), result }
  })
  const { letGo, peakBytes } = rig.plugin.news(VM)
  await rig.plugin.release(VM)
  const { rpoMs, lagMs, abandoned } = samples
  say(`rpo: ${lagMs.length} checkpoints in ${seconds} s at ${result.iops.toFixed(0)} IOPS, ${abandoned} abandoned, RPO at worst ${Math.max(...rpoMs)} ms, lag at worst ${Math.max(...lagMs).toFixed(0)} ms`)
  const at = `at ${result.iops.toFixed(0)} IOPS, half of the maximum; ${lagMs.length} checkpoints, ${abandoned} abandoned`
  const trouble = letGo.length > 0 ? `; CAPTURE LET GO: ${letGo[0]}` : `; at most ${(peakBytes / 2 ** 20).toFixed(0)} MiB held`
  const figure = (name: string, values: readonly number[], share: number, target: string): Figure => ({
    name, value: values.length > 0 ? quantile(values, share) : NaN, unit: 'ms', reference: null, ratio: null, ...(quick ? { reduced: true } : {}), note: `target ${target}; ${at}${trouble}`,
  })
  return [figure('rpo.p50', rpoMs, 0.5, 'none'), figure('rpo.p99', rpoMs, 0.99, 'below 1500 ms'), figure('lag.p99', lagMs, 0.99, 'below 400 ms')]
}
