import { agentApi, pluginApi, type Retention } from '../../core/api/index.ts'
import { errorCode } from '../../core/errors/index.ts'
import { closeQuiet } from '../e2e/point-images.ts'
import { VMS, VPG } from '../e2e/two-sites.ts'
import { tool } from '../lab/index.ts'
import { until } from '../lab/sites.ts'
import { HIT, PROMOTING, type FaultRig } from './fault-rig.ts'
import type { Phase } from './matrix.ts'

const MiB = 1 << 20
const nothing: AsyncDisposable = { [Symbol.asyncDispose]: async () => undefined }

/** Brings a phase about, under a protected group but for the first copy; disposing ends what only this phase needs, once. */
export const enterPhase = async (rig: FaultRig, phase: Phase): Promise<AsyncDisposable> => {
  const { sites } = rig.all
  switch (phase) {
    case 'initial':
      await sites.createVpg(VPG, VMS.map(({ vmId }) => vmId), 1_000)
      await rig.untilSyncing('initial')
      return nothing
    case 'streaming':
      return nothing
    case 'spill':
      return spill(rig)
    case 'bitmap sync':
      // What nobody captures is a lot, so that the sync takes its time.
      await sites.plugin.kill()
      await rig.write(24)
      await sites.plugin.start()
      await rig.untilSyncing('bitmap')
      return nothing
    case 'delta sync':
      await until('everything is compared again', 120_000, async () => {
        try {
          return await sites.plugin.answers(() => sites.plugin.api.call(pluginApi.forceSync, { params: { name: VPG }, body: { vmId: HIT } }))
        } catch (error) {
          if (errorCode(error) === 'CONFLICT') return undefined
          throw error
        }
      })
      await rig.untilSyncing('delta')
      return nothing
    case 'promotion':
      return promotion(rig)
    case 'point open':
      return readPoint(rig)
  }
}

const spill = async ({ all, link }: FaultRig): Promise<AsyncDisposable> => {
  await link.cut()
  const guest = all.guest(HIT)
  const busy = guest.start('while :; do dd if=/mnt/scsi0/random of=/mnt/scsi1/copy bs=1M conv=fsync 2>/dev/null; done')
  await until('memory overflows', 240_000, async () => (await all.vpg()).vms.some(({ spilledBytes = 0 }) => spilledBytes > 4 * MiB) || undefined)
  return once(async () => {
    // The guest may have been ended, and the job with it.
    if (guest === all.guest(HIT)) await guest.end(busy, 'KILL')
    await link.heal()
  })
}

/** Undefined: the agent has only just begun. */
const retention = (rig: FaultRig): Promise<Retention | undefined> => rig.all.sites.agent.api.call(agentApi.showRetention, { params: { name: VPG } }).catch((error: unknown) => {
  if (errorCode(error) === 'NOT_FOUND') return undefined
  throw error
})

/** The journal passes its limit, and the oldest history goes into the mirror, slowly; it has to come to its end. */
const promotion = async (rig: FaultRig): Promise<AsyncDisposable> => {
  const { toUnixMs } = await until('history is promoted', 180_000, async () => {
    const now = await retention(rig)
    if (now !== undefined && now.promotion !== null) return now.promotion
    const isFilling = now === undefined || now.vms.every(({ journalBytes }) => journalBytes < 2 * PROMOTING.journalLimitBytes)
    if (isFilling) await rig.write(8)
    return undefined
  }, async () => JSON.stringify(await retention(rig)))
  return once(async () => void (await until('the promotion comes to its end', 180_000, async () => {
    const now = await retention(rig)
    return (now?.from !== undefined && now.from.atUnixMs >= toUnixMs) || undefined
  }, async () => JSON.stringify(await retention(rig)))))
}

/** Reads a point from end to end, again and again, while the fault happens; an agent that dies takes the point with it. */
const readPoint = async ({ all: { sites } }: FaultRig): Promise<AsyncDisposable> => {
  const [newest] = await sites.checkpoints(VPG, 1)
  const point = await sites.openPoint(VPG, newest.id)
  let reading = true
  const readers = (async () => {
    while (reading) for (const { uri } of point.disks) await tool('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', uri, '/dev/null'], { deadlineMs: 60_000 }).catch(() => undefined)
  })()
  return once(async () => {
    reading = false
    await readers
    const { points } = await sites.agent.api.call(agentApi.listPoints, {})
    if (points.some(({ pointId }) => pointId === point.pointId)) await closeQuiet(sites, point.pointId)
  })
}

const once = (end: () => Promise<void>): AsyncDisposable => {
  let ending: Promise<void> | undefined
  return { [Symbol.asyncDispose]: () => (ending ??= end()) }
}
