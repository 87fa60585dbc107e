import { CdpError } from '../errors/index.ts'

/** The generation of a group that was never handed over. */
export const FIRST_GENERATION = 1

/** superseded: somebody else owns the group by now. ahead: the recovery site does not know of a handover that the sender knows of. */
export type GenerationVerdict = 'current' | 'superseded' | 'ahead'

/** What a stream of generation `sent` is to a recovery site at which the group has generation `held`. */
export const judgeGeneration = (sent: number, held: number): GenerationVerdict => (sent === held ? 'current' : sent < held ? 'superseded' : 'ahead')

/**
 * The error with which such a stream ends, on either side; undefined if it may go on. Its context has `generation`: what the recovery site holds.
 * @param why of the handover, for people
 */
export const generationError = (vpg: string, sent: number, held: number, why?: string): CdpError | undefined => {
  const context = { vpg, generation: held }
  switch (judgeGeneration(sent, held)) {
    case 'current':
      return undefined
    case 'superseded':
      return new CdpError('FENCED', `the recovery site has taken ${vpg} over (generation ${held}, here ${sent})${why === undefined ? '' : `: ${why}`}`, {
        context, hint: `Decide on which site its VMs run. To protect them from here once more, first end this group with "pvecdp vpg delete ${vpg}".`,
      })
    case 'ahead':
      return new CdpError('GENERATION_AHEAD', `the recovery site has ${vpg} in generation ${held}, here it is in ${sent}: that site has forgotten a handover`, {
        context, hint: 'The recovery site was probably restored from an old backup. Nothing is sent to it until its state is put right.',
      })
  }
}
