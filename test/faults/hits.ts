import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../../core/errors/index.ts'
import { endWorker, hangWorker } from '../e2e/hang-worker.ts'
import { SlowDisk } from '../lab/slow-disk.ts'
import { SmallDisk } from '../lab/small-disk.ts'
import { HIT, type FaultRig } from './fault-rig.ts'
import type { Cell } from './matrix.ts'

/** How long a fault lasts that does not end by itself. */
const HOLD_MS = 5_000
const LINK_HOLD_MS = 10_000
const SLOW_BITS_PER_SEC = 4_000_000
const LOST_SHARE = 0.02
const SLOW_OPERATIONS_PER_SEC = 5

/** Does to a component what a cell says, and ends it; afterwards everything runs again that should. */
export const hit = async (rig: FaultRig, cell: Cell): Promise<void> => {
  switch (cell.component) {
    case 'plugin':
    case 'agent':
      return hitDaemon(rig, cell)
    case 'worker':
      await (cell.fault === 'SIGKILL' ? endWorker : hangWorker)(rig.all.sites.plugin, `capture-${HIT}`)
      return void (await delay(HOLD_MS))
    case 'QEMU':
      return hitGuest(rig, cell)
    case 'link':
      return hitLink(rig, cell)
  }
}

/** A line that was cut before comes back as bad as the cell says. */
const hitLink = async ({ link }: FaultRig, { fault, phase }: Cell): Promise<void> => {
  if (phase === 'spill') await link.heal()
  if (fault === 'cut') await link.cut()
  else if (fault === 'slow') await link.slow(SLOW_BITS_PER_SEC)
  else await link.lose(LOST_SHARE)
  await delay(LINK_HOLD_MS)
  await link.heal()
}

const hitDaemon = async (rig: FaultRig, { component, fault }: Cell): Promise<void> => {
  const daemon = rig.all.sites[component === 'plugin' ? 'plugin' : 'agent']
  const disk = component === 'plugin' ? rig.spillDisk : rig.journalDisk
  switch (fault) {
    case 'SIGKILL':
      await daemon.kill()
      await delay(HOLD_MS)
      return daemon.start()
    case 'restart':
      await daemon.stop()
      return daemon.start()
    case 'SIGSTOP':
      daemon.signal('SIGSTOP')
      await delay(HOLD_MS)
      daemon.signal('SIGCONT')
      // The watchdog ends a plugin that hangs; systemd would start it again.
      if (daemon.pid === undefined || (component === 'plugin' && (await daemon.ended(1_000)))) await daemon.start()
      return
    case 'disk full':
      if (!(disk instanceof SmallDisk)) throw new CdpError('INTERNAL', 'this rig has no disk to fill')
      await disk.fill()
      await rig.write(4)
      await delay(HOLD_MS)
      return disk.empty()
    case 'slow disk':
      if (!(disk instanceof SlowDisk)) throw new CdpError('INTERNAL', 'this rig has no disk to slow down')
      await disk.slow(SLOW_OPERATIONS_PER_SEC)
      await rig.write(4)
      await delay(HOLD_MS)
      return disk.fast()
    case 'cut':
    case 'slow':
    case 'lossy':
      throw new CdpError('BAD_INPUT', `a daemon has no ${fault}`)
  }
}

const hitGuest = async (rig: FaultRig, { fault }: Cell): Promise<void> => {
  const guest = rig.all.guest(HIT)
  if (fault === 'SIGSTOP') {
    process.kill(guest.vm.pid, 'SIGSTOP')
    await delay(HOLD_MS)
    return void process.kill(guest.vm.pid, 'SIGCONT')
  }
  await rig.endChain()
  await (fault === 'SIGKILL' ? guest.kill() : guest.stop())
  await rig.all.boot(HIT)
  await rig.beginLife(HIT)
  rig.beginChain()
}
