"""The words that a text states its writer's number with, by language; reading.py says what each list is for.

Every entry is a regular expression of alternatives, in lower case.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """What is looked for in one language.

    Attributes:
        states: What states the writer's own number, and is followed by it: "i choose", "my number is".
        perhaps: The same, where nothing else is said: "my guess is" may be one of the average.
        labels: What may stand before a colon and the number.
        final: What states a number that counts where an earlier statement differs.
        now: What may stand before a statement at the beginning of a sentence without changing it.
        because: What an explanation begins with.
        stated: What states the number that stands before it: "を選びます", with the subject before both.
        comma: Whether 33,5 is a number.
    """

    states: str
    perhaps: str
    labels: str
    final: str
    now: str
    because: str
    stated: tuple[str, str] = ("", "(?!)")
    comma: bool = True


LANGUAGES = {
    "en": Words(
        states=r"i(?:'ll| will| would|'d| now| therefore| finally| hereby| personally| just| again| still)*"
        r" (?:choose|pick|select|go (?:with|for)|submit|play|opt for|settle (?:on|for)|name|enter|propose|decide on"
        r"|stick (?:with|to)|stay (?:with|at)|keep)"
        r"|i(?:'m| am)(?: now| therefore| just)? (?:going (?:to (?:choose|pick|select|go with|submit)|with|for)"
        r"|choosing|picking|selecting|submitting|sticking with|settling (?:on|for))"
        r"|i (?:think|guess|believe) i(?:'ll| will|'d| would|'m going to)? (?:choose|pick|go (?:with|for))"
        r"|i(?:'d| would) (?:like to|rather) (?:choose|pick|go with|submit)|let(?:'s| me) (?:go with|pick|choose)"
        r"|my (?:own |chosen |new |secret )*(?:number|answer|choice|pick|response|decision|bid)"
        r"(?: for (?:this|the current) round| this (?:time|round)| now)? (?:is|will be|would be|remains)"
        r"|the number (?:that )?i(?:'ll| will| would)? (?:choose|pick|give|submit)(?: now)? is",
        perhaps=r"i(?:'ll| will| would|'d)? (?:say|guess|answer|take)|i'm (?:going to (?:say|guess)|guessing)"
        r"|i(?:'ve| have) (?:decided on|settled on)|my (?:guess|best guess|best|estimate) is"
        r"|i (?:think|guess|believe) i(?:'ll| will|'d| would)? (?:say|guess|take|give)"
        r"|my choice for the number is|the (?:answer|number|best (?:number|choice|guess|answer)) is"
        r"|(?:here is |here's )?(?:a|the|your) number:|assistant:|me:|guess:|response:",
        labels=r"(?:my |the |here is my |here's my )?(?:own |chosen |selected )?(?:number|answer|choice|pick|decision"
        r"|selection)(?: for this round)?",
        final=r"(?:my |the )?(?:final|definitive) (?:answer|number|choice|decision|guess"
        r"|pick)(?: for this round)?(?: is)?",
        now="so|therefore|thus|hence|consequently|accordingly|ok(?:ay)?|well|sure|alright|all right|yes|right|great"
        "|and|but|this time|now|finally|on reflection|then"
        r"|ultimately|in the end|overall|in (?:conclusion|summary)|to (?:conclude|win)|personally|for me|today"
        r"|(?:in |for )?this round|(?:in|for) round \d{1,4}|(?:in|for) (?:the|this) \d{1,4}(?:st|nd|rd|th) round"
        r"|after (?:some |careful )?(?:thought|thinking|consideration)|with that in mind|for th(?:is|ese) reasons?",
        because="because|since|given|considering|based on|hoping|believing|thinking",
        comma=False,
    ),
    "de": Words(
        states="ich (?:wähle|nehme|bleibe bei|entscheide mich(?: jetzt| nun)? für)(?: daher| also| deshalb| jetzt"
        "| nun)?"
        "|(?:wähle|nehme) ich(?: jetzt| nun)?|entscheide ich mich für"
        "|meine (?:gewählte )?(?:zahl|antwort|wahl|entscheidung) (?:ist|lautet)",
        perhaps="ich (?:sage|tippe(?: auf)?|rate|gebe|setze(?: auf)?|antworte(?: mit)?)|mein tipp (?:ist|lautet)"
        "|meine schätzung (?:ist|lautet)|die (?:zahl|antwort) (?:ist|lautet)",
        labels="(?:meine )?(?:zahl|antwort|wahl)",
        final="(?:meine |die )?endgültige (?:antwort|zahl|wahl)(?: ist| lautet)?",
        now="also|daher|deshalb|deswegen|darum|somit|gut|na gut|in dieser runde|diesmal|dieses mal|jetzt|nun|und|aber",
        because="weil|denn|da ich|da die",
    ),
    "fr": Words(
        states="je (?:choisis|prends|propose|opte pour|joue|sélectionne|vais (?:choisir|prendre|jouer))"
        "(?: donc| finalement)?|mon (?:nombre|choix|chiffre)(?: est|:)|ma (?:réponse|décision) est",
        perhaps="je (?:dis|réponds|donne|mise sur|dirais)|ma proposition est|la réponse est",
        labels="(?:mon |ma )?(?:nombre|réponse|choix)",
        final="(?:ma )?réponse (?:finale|définitive)(?: est)?",
        now="par conséquent|c'est pourquoi|bon|finalement|d'accord|(?:à|pour) ce tour|cette fois(?:-ci)?|maintenant"
        "|et|mais|donc",
        because="parce que|car|puisque",
    ),
    "es": Words(
        states="(?:yo )?(?:elijo|escojo|opto por|selecciono|me quedo con|voy a (?:elegir|escoger)|elegiré|propongo)"
        "|mi (?:número|elección|decisión|respuesta) (?:es|será)|el número que elijo es",
        perhaps="(?:yo )?(?:digo|respondo|voy con)|mi apuesta es|la respuesta es",
        labels="(?:mi )?(?:número|respuesta|elección)",
        final="(?:mi )?respuesta final(?: es)?",
        now="por eso|por lo tanto|por tanto|bien|bueno|(?:en|para) esta ronda|esta vez|ahora|y|pero|así que",
        because="porque|ya que|pues",
    ),
    "it": Words(
        states="(?:io )?(?:scelgo|prendo|opto per|seleziono|propongo|gioco|sceglierò|sceglierei)"
        "|(?:il )?mio numero è|(?:la )?mia (?:risposta|scelta) è",
        perhaps="(?:io )?(?:dico|punto su|rispondo)|la mia proposta è|la risposta è",
        labels="(?:il mio |la mia )?(?:numero|risposta|scelta)",
        final="(?:la mia )?risposta finale(?: è)?",
        now="perciò|pertanto|dunque|bene|in questo turno|stavolta|questa volta|ora|adesso|e|ma|quindi",
        because="perché|poiché|dato che",
    ),
    "pt": Words(
        states="(?:eu )?(?:escolho|opto por|seleciono|fico com|vou escolher|proponho)"
        "|(?:o )?meu número é|(?:a )?minha (?:resposta|escolha) é",
        perhaps="(?:eu )?(?:digo|respondo|aposto em|vou (?:de|com))|a resposta é",
        labels="(?:o meu |a minha )?(?:número|resposta|escolha)",
        final="(?:a minha )?resposta final(?: é)?",
        now="por isso|bem|bom|nesta rodada|desta vez|agora|e|mas|portanto",
        because="porque|pois|já que",
    ),
    "nl": Words(
        states="ik (?:kies(?: voor)?|neem|ga voor)|(?:kies|neem) ik(?: nu)?(?: voor)?|mijn (?:getal|nummer|antwoord"
        "|keuze) is",
        perhaps="ik (?:zeg|gok(?: op)?|antwoord)|het antwoord is",
        labels="(?:mijn )?(?:getal|antwoord|keuze)",
        final="(?:mijn )?(?:definitie(?:f|ve)|uiteindelijke) antwoord(?: is)?",
        now="daarom|goed|in deze ronde|deze keer|nu|en|maar|dus",
        because="omdat|want|aangezien",
    ),
    "pl": Words(
        states="(?:ja )?(?:wybieram|biorę)|moja (?:liczba|odpowiedź|decyzja)(?: to| jest)|mój wybór(?: to|:)",
        perhaps="(?:ja )?(?:podaję|mówię|stawiam(?: na)?|typuję)|mój typ to",
        labels="(?:moja )?(?:liczba|odpowiedź)",
        final="(?:moja )?ostateczna odpowiedź(?: to)?",
        now="więc|dlatego|zatem|dobrze|w tej rundzie|tym razem|teraz|i|ale",
        because="ponieważ|bo|gdyż",
    ),
    "ru": Words(
        states="(?:я )?(?:выбираю|беру|называю|выберу|назову)|я бы выбрала?|мо[йеё] (?:число|ответ|выбор"
        "|номер)(?: это)?(?: [—–-])?",
        perhaps="(?:я )?(?:загадываю|ставлю(?: на)?|отвечаю|говорю|предлагаю)",
        labels="(?:мо[йеё] )?(?:число|ответ|выбор)",
        final="(?:мой )?(?:окончательный|итоговый) ответ",
        now="значит|следовательно|итак|хорошо|в этом раунде|(?:в|на) этот раз|теперь|сейчас|и|но|поэтому",
        because="потому|так как|поскольку",
    ),
    "uk": Words(
        states="(?:я )?(?:обираю|вибираю|виберу|оберу)|(?:моє число|моя відповідь|мій вибір)(?: це)?(?: [—–-])?",
        perhaps="(?:я )?(?:називаю|кажу)",
        labels="(?:моє )?число|(?:моя )?відповідь",
        final="(?:моя )?остаточна відповідь",
        now="тому|отже|добре|(?:у|в) цьому раунді|цього разу|тепер",
        because="бо|тому що|оскільки",
    ),
    "tr": Words(
        states="(?:benim )?(?:sayım|cevabım|seçimim)|seçtiğim sayı",
        perhaps="(?:benim )?(?:tahminim|yanıtım)",
        labels="(?:benim )?(?:sayı|cevap|yanıt|sayım|cevabım|seçimim)",
        final="(?:nihai|son) (?:cevap|cevabım|yanıt)",
        now="bu yüzden|bu nedenle|tamam|bu turda|bu sefer|bu kez|şimdi|ve|ama|ben",
        because="çünkü",
        stated=("(?:ben )?", r"(?:'\w{1,3})? (?:sayısını )?(?:seçiyorum|seçerim)"),
    ),
    "sv, da, no": Words(
        states="jag (?:väljer|tar)|(?:väljer|tar) jag|jeg (?:vælger|velger|tager|tar)|(?:vælger|velger) jeg"
        "|mitt? (?:tal|tall|svar|val|valg) (?:är|er|blir)",
        perhaps="jag (?:säger|gissar på)|jeg (?:siger|sier|gætter på)",
        labels="(?:mitt? )?(?:tal|svar|val|tall|valg)",
        final="slutgiltigt svar|endeligt? svar",
        now="därför|derfor|okej|den här gången|den här omgången|denne gang|och|og",
        because="eftersom|för att|fordi",
    ),
    "id": Words(
        states="saya (?:akan )?(?:memilih|pilih)|(?:angka|jawaban|pilihan) saya adalah",
        perhaps="jawabannya adalah",
        labels="(?:angka|jawaban|pilihan)(?: saya)?",
        final="jawaban akhir(?: saya)?",
        now="oleh karena itu|baik|kali ini|sekarang|jadi",
        because="karena|sebab",
    ),
    "vi": Words(
        states="tôi (?:sẽ )?chọn(?: số)?|(?:số|câu trả lời|lựa chọn|đáp án) của tôi là|số tôi chọn là",
        perhaps="tôi đoán",
        labels="số|câu trả lời|đáp án",
        final="câu trả lời cuối cùng",
        now="vì vậy|nên|do đó|được rồi|vòng này|lần này|bây giờ",
        because="vì|bởi vì",
    ),
    "zh": Words(
        states="(?:这次|这一轮|本轮|现在|這次|這一輪)?我(?:就|会|會|要|将|將)?(?:选择|選擇|选|選|决定选择|决定选)"
        "(?:的)?(?:数字|數字)?(?:是|为|為)?|我(?:这一轮)?的(?:数字|數字|答案|选择|選擇|回答)(?:是|为|為)",
        perhaps="我(?:猜|出|给出|報|报)|(?:数字|數字|答案)(?:是|为|為)",
        labels="(?:我的)?(?:数字|數字|答案|选择|選擇|回答)",
        final="(?:我的)?最[终終]答案(?:是|为|為)?",
        now="于是|於是|好的?|这次|這次|这一轮|本轮|这一次|现在|所以|因此",
        because="因为|因為",
        comma=False,
    ),
    "ja": Words(
        states="(?:私の|私が選ぶ)(?:数字|答え|選択|回答)?は",
        perhaps="(?:数字|答え|回答)は",
        labels="(?:私の)?(?:答え|数字|回答)",
        final="最終(?:的な)?(?:回答|答え)は?",
        now="だから|したがって|よって|では|はい|今回は",
        because="なぜなら",
        stated=("(?:私は|僕は)?、?", "を(?:選びます|選択します)|に(?:します|決めます)"),
        comma=False,
    ),
    "ko": Words(
        states="(?:제|저의|내|나의) (?:숫자|답|선택|대답|답변|번호)(?:은|는)",
        perhaps="(?:답|숫자)은",
        labels="(?:제 )?(?:답|숫자|정답|답변)",
        final="최종 (?:답변?|숫자)(?:은|는)?",
        now="그래서|따라서|그러므로|좋아요|네|이번에는|이번엔",
        because="왜냐하면",
        stated=(
            "(?:저는|나는|제가)? ?(?:숫자 )?",
            "번?(?:을|를|으로|로)? ?(?:선택합니다|선택하겠습니다|선택할게요|고르겠습니다|고릅니다)",
        ),
        comma=False,
    ),
    "ar": Words(
        states="(?:أنا )?(?:أختار|سأختار)|(?:رقمي|إجابتي|اختياري|جوابي)(?: هو| هي)|(?:الرقم|العدد) الذي أختاره هو",
        perhaps="أقول",
        labels="(?:الجواب|الإجابة|إجابتي|رقمي)",
        final="الإجابة النهائية|الجواب النهائي",
        now="لذلك|لذا|حسنا|هذه المرة|الآن",
        because="لأن",
        comma=False,
    ),
    "hi": Words(
        states="मेर[ाी] (?:उत्तर|नंबर|जवाब|चुनाव|संख्या|अंक)(?: है)?",
        perhaps="उत्तर",
        labels="(?:मेर[ाी] )?(?:उत्तर|जवाब|संख्या)",
        final="(?:मेरा )?अंतिम (?:उत्तर|जवाब)",
        now="इसलिए|ठीक है|इस बार|इस दौर में|अब",
        because="क्योंकि",
        stated=(
            "मैं (?:संख्या |नंबर )?",
            " (?:को )?(?:चुनत[ाी] हू[ँं]|चुनू[ँं]ग[ाी])",
        ),
        comma=False,
    ),
}
SUPPOSING = (  # what a sentence begins with after which the next may be another one's, or supposed
    "here is (?:how|what)|suppos|imagin|pretend|let us|let's|let me|consider\\b|for (?:example|instance)|e\\.g"
    "|assum|say|what if"
    "|in the case"
    "|angenommen"
    "|stell|nehmen wir|zum beispiel|z\\.b|par exemple|por ejemplo|immagin|ad esempio|por exemplo|stel|bijvoorbeeld"
    "|załóżmy|na przykład"
    "|допустим|предпол|например|припуст|diyelim|örneğin|anta|till exempel|for eksempel|misal|andai|giả sử|ví dụ|假设"
    "|假設|假如|例如|もし|例えば"
    "|만약|예를|لنفترض|मान ल"
)
OWN_HEADING = (  # what may stand before a colon and words of the writer's own
    r"\W*(?:step|reason|my|here|answer|final|decision|explanation|analysis|conclusion|calculation|begründung"
    r"|schritt|étape"
    r"|raison|paso|passo|\d)"
)
FIGURES = (  # what a line may tell a figure of that is nobody's answer
    "average|mean|target|expected|estimate|2/3|two[- ]thirds|date|confidence|ratio|durchschnitt|ziel|moyenne|cible"
    "|promedio"
    "|objetivo|media|obiettivo|média|alvo|gemiddelde|doel|średnia|среднее|平均|目标"
)
LEADING = (  # what a sentence says or ends with after which a number is somebody else's, or a template's
    r".*\b(?:example|format|like this|as follows|following|below|statement|answers?|says|replies|turn|final number"
    r"|this)\W*$"
    r"|.*\b(?:conclusion|way|moment|one|ainsi|así|lauten|announced|result|smiles)\W*$|.*\bplayer \d"
    r"|.*\b(?:example|sample|format|winning|winner|solve|compute|find|quiz|has to|please|you (?:can|should|must))\b"
    r"|.*(?:average|mean|durchschnitt|moyenne|promedio|media|média|gemiddelde|średni\w*|среднее"
    r"|平均数?)\b.*(?<!\d)\W*$(?<!\d.)"
)
BACK = (  # words that may take back a number in an explanation after it
    "wait|hm+|actually|scratch|strike|cancel|correct\\w*|oops|no|nope|nah|second thoughts?|chang\\w*|let me"
    "|never ?mind"
    "|re-?(?:consider|think|vis)\\w*|uns?ure|instead|forget|ignore|disregard|or|maybe|perhaps|mistake|wrong|but"
    "|however|yet|though"
    "|although|hold on|adjust\\w*|alternatively|should|could|might|meant?|rather|better|kidding|sorry|apolog\\w*"
    "|unless|except|if|otherwise"
    "|aber|doch|jedoch|allerdings|sonst|oder|lieber|nein|mais|sinon|ou|plutôt|non|pero|sino|o|mejor|ma|però|oppure"
    "|anzi|mas|porém|não|maar|nee|of"
    "|liever|ale|jednak|albo|lub|nie|но|однако|или|лучше|нет|але|або|ama|ancak|veya|hayır|men|eller|nej|tapi|namun"
    "|atau|nhưng|hoặc"
)
BACK_UNSPACED = "但|不过|不過|还是|還是|或|其实|でも|しかし|やっぱり|または|하지만|아니|또는|لكن|أو |بل |लेकिन|या |नहीं"
CLOSING = (  # what may follow a statement without changing it
    "(?:for|in) this round|this (?:time|round)|now|again|please|thanks|thank you[^.!?,\\d]{0,60}+"
    "|good luck[^.!?,\\d]{0,60}+"
    "|let me know[^.!?,\\d]{0,60}+|as my (?:final )?(?:number|answer|choice)"
    "|to win(?: (?:this|the) (?:game|round))?|i hope(?: it is correct| i win| that helps)?|final(?: answer)?|i think"
    "|i guess|viel glück|bonne chance|buena suerte"
    "|suerte|buona fortuna|boa sorte|veel succes|powodzenia|удачи|lycka till|祝你好运|よろしくお願いします"
)
THE_NUMBER = (  # what may stand between a statement and its number
    r"(?: ?(?:the (?:whole |same )?(?:number|value|integer)|a number|number|die(?: zahl)?|zahl|le(?: nombre"
    r"| chiffre)?|nombre"
    r"|el(?: número)?|número|il(?: numero)?|numero|o(?: número)?|het(?: getal)?|getal|liczbę|число|số|angka|talet"
    r"|tallet"
    r"|(?:ال)?(?:عدد|رقم)|数字|數字))?"
)
UNITS = r"(?: ?(?:%|points?|percent|€|\$|punkte|puntos|punti|pontos|点|分))?"
COPULA = "(?:です|だ|にします|とします| ?(?:입니다|이다|예요|이에요)| है)?"  # after a number that was stated
